"""Forms of experts' matrices: what a method stores, what it counts, and how it becomes matrices.

A form is a module whose call returns matrices (E, out, in), or a factor of them. Its leaves hold
numbers. A leaf knows how many bits a file needs for it, and two forms may share a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

# Bits of a stored number, and of the scale of a group of quantised ones.
_BITS = 16
GROUP = 64


class Leaf(nn.Module):
    """Numbers that a form stores.

    Attributes
    ----------
    count : int
        Stored numbers, without scales.
    bits : int
        Size in a file.
    """

    count: int
    bits: int


class Whole(Leaf):
    """Numbers as they are; a file holds two bytes for each.

    Parameters
    ----------
    value : Tensor
    free : int
        Numbers that a gauge makes 0 or 1, which no file needs.
    """

    def __init__(self, value: Tensor, free: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(value.float().contiguous())
        self.free = free
        self.count = value.numel() - free
        self.bits = _BITS * self.count

    def forward(self) -> Tensor:
        """Return the numbers."""
        return self.value


class Quantised(Leaf):
    """Numbers rounded to a few levels, with a scale for each group of a row.

    Parameters
    ----------
    codes : Tensor, shape (..., n)
        Whole numbers.
    scales : Tensor, shape (..., groups)
        Groups of 64 lie along the last axis; the last group of a row may be smaller.
    bits : int
        Bits of a code.
    free : int
        Codes that no file needs, with their share of scales.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bits: int, free: int = 0) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        # Training changes scales by factors, whatever their size.
        self.growth = nn.Parameter(torch.zeros_like(scales))
        self.count = codes.numel() - free
        share = self.count / codes.numel()
        self.bits = bits * self.count + round(_BITS * scales.numel() * share)

    def forward(self) -> Tensor:
        """Return the rounded numbers."""
        assert isinstance(self.codes, Tensor)
        assert isinstance(self.scales, Tensor)
        scales = (self.scales * self.growth.exp()).repeat_interleave(GROUP, dim=-1)
        return self.codes * scales[..., : self.codes.shape[-1]]


class Places(Leaf):
    """Whole numbers that say where columns stand, four bytes each.

    Parameters
    ----------
    order : Tensor
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.count, self.bits = order.numel(), 32 * order.numel()

    def forward(self) -> Tensor:
        """Return the numbers."""
        assert isinstance(self.order, Tensor)
        return self.order


class Product(nn.Module):
    """A product of forms; a factor that all experts share has one matrix or no axis of experts."""

    def __init__(self, *factors: nn.Module) -> None:
        super().__init__()
        self.factors = nn.ModuleList(factors)

    def forward(self) -> Tensor:
        """Multiply the factors."""
        first, *others = (factor() for factor in self.factors)
        for other in others:
            first = first @ other
        return first


class Sum(nn.Module):
    """A sum of forms."""

    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self) -> Tensor:
        """Add the terms."""
        first, *others = (term() for term in self.terms)
        for other in others:
            first = first + other
        return first


class Part(nn.Module):
    """Some rows of the matrices that a form builds; the other rows are elsewhere.

    Parameters
    ----------
    whole : Module
    start, size : int
    """

    def __init__(self, whole: nn.Module, start: int, size: int) -> None:
        super().__init__()
        self.whole, self.start, self.size = whole, start, size

    def forward(self) -> Tensor:
        """Return the rows."""
        return self.whole().narrow(1, self.start, self.size)


class Gauged(nn.Module):
    """Factors (E, r, in) of which r columns are those of the identity, which no file stores.

    Parameters
    ----------
    rest : Module
        Builds the other columns, (E, r, in − r).
    order : Tensor, shape (E, in)
        Where every column comes from: identity first, then the rest.
    """

    def __init__(self, rest: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.rest, self.places = rest, Places(order)

    def forward(self) -> Tensor:
        """Put the columns in their places."""
        rest, order = self.rest(), self.places()
        count, rank = rest.shape[:2]
        columns = torch.cat([torch.eye(rank).expand(count, -1, -1), rest], dim=-1)
        return columns.gather(2, order[:, None].expand_as(columns))


class Basis(nn.Module):
    """Factors f(Σ_j α_ej B_j), combinations of matrices that experts share (arXiv:2508.05257)."""

    def __init__(self, shares: Tensor, matrices: Tensor) -> None:
        super().__init__()
        self.shares, self.matrices = Whole(shares), Whole(matrices)

    def forward(self) -> Tensor:
        """Combine the shared matrices."""
        return torch.tanh(torch.einsum("ej,jrq->erq", self.shares(), self.matrices()))


class Together(nn.Module):
    """Forms of single experts, one after another."""

    def __init__(self, forms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)

    def forward(self) -> Tensor:
        """Return the matrices of all forms."""
        return torch.cat([form() for form in self.forms])


class Transposed(nn.Module):
    """The transposed matrices of a form."""

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self) -> Tensor:
        """Return the matrices with rows and columns exchanged."""
        return self.form().mT


class Chain(nn.Module):
    """Chains of cores (left, out, in, right), owned ones with a first axis of experts."""

    def __init__(self, cores: Sequence[nn.Module], experts: int, out: int, in_: int) -> None:
        super().__init__()
        self.cores = nn.ModuleList(cores)
        self.experts, self.out, self.in_ = experts, out, in_

    def forward(self) -> Tensor:
        """Contract the cores from the left."""
        whole = torch.ones(1, 1, 1, 1)
        for module in self.cores:
            core = module()
            core = core if core.ndim == 5 else core[None]
            whole = torch.einsum("eyab,eboic->eyoaic", *_same_experts(whole, core))
            count, y, o, a, i, c = whole.shape
            whole = whole.reshape(count, y * o, a * i, c)
        matrices = whole[..., 0][:, : self.out, : self.in_]
        return matrices.expand(self.experts, -1, -1)


def _same_experts(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give two arrays the same number of experts, of which one may have a single one."""
    count = max(first.shape[0], second.shape[0])
    return first.expand(count, *first.shape[1:]), second.expand(count, *second.shape[1:])


class Experts(nn.Module):
    """The experts of a layer in a compressed form; takes the place of ``MixtralExperts``.

    Parameters
    ----------
    up, gate, down : Module
        Forms of the matrices.
    owner : sequence of int, optional
        For every expert of the router the number of the matrices that it uses.
    kept : sequence of int, optional
        Experts that the router keeps; by default all.
    """

    def __init__(
        self,
        up: nn.Module,
        gate: nn.Module,
        down: nn.Module,
        *,
        owner: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, gate, down
        self.owner, self.kept = owner, kept

    def leaves(self) -> list[Leaf]:
        """Return what a file stores, each once."""
        return [module for module in self.modules() if isinstance(module, Leaf)]

    @property
    def count(self) -> int:
        """Stored numbers."""
        return sum(leaf.count for leaf in self.leaves())

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return sum(leaf.bits for leaf in self.leaves()) // 8

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return up, gate and down for every expert that the router knows."""
        built = self.up(), self.gate(), self.down()
        if self.owner is None:
            return built
        owner = torch.tensor(list(self.owner))
        return built[0][owner], built[1][owner], built[2][owner]

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Send every token through its experts, as transformers' ``MixtralExperts`` does."""
        result = torch.zeros_like(states)
        # Tensors that zip takes apart as a whole have one derivative, and not one per expert.
        for expert, (up, gate, down) in enumerate(zip(*self.matrices(), strict=True)):
            token, place = torch.where(index == expert)
            if len(token):
                inputs = states[token]
                hidden = nn.functional.silu(inputs @ gate.mT) * (inputs @ up.mT)
                outputs = hidden @ down.mT * weights[token, place, None]
                result = result.index_add(0, token, outputs)
        return result


def experts_of(forms: Mapping[str, nn.Module]) -> Experts:
    """Return the experts with the forms up, gate and down."""
    return Experts(forms["up"], forms["gate"], forms["down"])


def replace_leaves(form: nn.Module, change: Callable[[Whole], Leaf]) -> None:
    """Put other leaves in the place of all whole ones of a form, in place."""
    found: dict[nn.Module, Leaf] = {}
    for module in list(form.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Whole):
                if child not in found:
                    found[child] = change(child)
                setattr(module, name, found[child])


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give two factors (E, out, r), (E, r, in) equal singular values; their product stays."""
    q, r = torch.linalg.qr(first)
    u, s, v = torch.linalg.svd(r @ second, full_matrices=False)
    rank = first.shape[-1]
    root = s[..., :rank].sqrt()
    return q @ (u[..., :rank] * root[..., None, :]), root[..., :, None] * v[..., :rank, :]
