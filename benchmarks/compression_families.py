"""Families of low-rank forms: for every rank what it costs, what it loses, and the form itself.

Errors are weighed by metrics. For a matrix W with inputs x and derivatives g of the loss by its
outputs, the loss changes by about ½·Σ (gᵀ ΔW x)² over slots. With moments S = Σ x xᵀ and
G = mean g gᵀ this is about ½·‖G^½ ΔW S^½‖² (the Kronecker factors of Martens and Grosse,
arXiv:1503.05671). All families of a model then measure errors in the same unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from compression_calibration import Layer, damped, roots
from compression_forms import Gauged, Part, Product, Sum, Whole
from scipy.linalg import qr
from torch import Tensor, nn

from tnmoe import distribute_budget

Metric = Literal["plain", "inputs", "both"]
# Ranks of a stack among which a budget chooses.
_OPTIONS = 64
# What a family decomposes together: each matrix apart, or up and gate of all experts as one stack.
SEPARATE = (("up",), ("gate",), ("down",))
JOINT = (("up", "gate"), ("down",))


@dataclass(frozen=True)
class Family:
    """Forms of a stack of matrices by rank.

    Attributes
    ----------
    names : tuple of str
        The matrices in the stack.
    full : int
        Numbers of the stack.
    costs : list of int
        Stored numbers by rank, from 1 on.
    errors : list of float
        Squared weighed errors.
    make : callable
        Builds the form of a rank.
    whole : callable
        Builds the form that keeps the matrices.
    """

    names: tuple[str, ...]
    full: int
    costs: list[int]
    errors: list[float]
    make: Callable[[int], nn.Module]
    whole: Callable[[], nn.Module]

    def largest(self, share: float) -> nn.Module:
        """Return the form of the largest rank that costs at most a share of the matrices."""
        if share >= 1:
            return self.whole()
        ranks = [rank for rank, cost in enumerate(self.costs, 1) if cost <= share * self.full]
        return self.make(max(ranks, default=1))

    @property
    def ranks(self) -> list[int]:
        """Some of the ranks that are smaller than the matrices."""
        smaller = sum(cost < self.full for cost in self.costs)
        return list(range(1, smaller + 1, -(-smaller // _OPTIONS) or 1))

    def options(self) -> list[tuple[int, float]]:
        """Return costs and errors of the ranks, and of the matrices as they are."""
        pairs = [(self.costs[rank - 1], self.errors[rank - 1]) for rank in self.ranks]
        return [*pairs, (self.full, 0.0)]

    def choose(self, option: int) -> nn.Module:
        """Return the form of an option."""
        return self.make(self.ranks[option]) if option < len(self.ranks) else self.whole()


@dataclass(frozen=True)
class Stack:
    """Matrices (E, out, in) that a family decomposes together, with their metrics.

    Attributes
    ----------
    names : tuple of str
    matrices : Tensor, shape (E, out, in)
    inputs : Tensor, shape (E, in, in)
    outputs : Tensor, shape (E, out, out)
    """

    names: tuple[str, ...]
    matrices: Tensor
    inputs: Tensor
    outputs: Tensor

    def apart(self) -> list[Stack]:
        """Return a stack for every single matrix."""
        triples = zip(
            self.matrices[:, None], self.inputs[:, None], self.outputs[:, None], strict=True
        )
        return [Stack(self.names, *triple) for triple in triples]

    def whole(self) -> nn.Module:
        """Return the form that keeps the matrices."""
        return Whole(self.matrices)


def stack(layer: Layer, names: tuple[str, ...], metric: Metric) -> Stack:
    """Return matrices of a layer in double precision, one after another."""
    matrices = torch.cat([getattr(layer, name) for name in names]).double()
    eye = [torch.eye(size, dtype=torch.float64) for size in matrices.shape[1:]]
    outputs = eye[0].expand(len(matrices), -1, -1)
    inputs = eye[1].expand(len(matrices), -1, -1)
    if metric != "plain":
        inputs = torch.cat([layer.moments(name) for name in names]).double()
    if metric == "both":
        # S sums over slots; the mean of g gᵀ makes the product one sum.
        slots = layer.slots.clamp_min(1)[:, None, None].double()
        outputs = torch.cat([layer.gradients[name].double() / slots for name in names])
    return Stack(names, matrices, inputs, outputs)


def tall_stack(layer: Layer, names: tuple[str, ...], metric: Metric) -> Stack:
    """Return the matrices of every expert on top of each other, since they have the same inputs."""
    parts = [stack(layer, (name,), metric) for name in names]
    outputs = [torch.block_diag(*each) for each in zip(*(p.outputs for p in parts), strict=True)]
    matrices = torch.cat([part.matrices for part in parts], dim=1)
    return Stack(names, matrices, parts[0].inputs, torch.stack(outputs))


def owned_family(given: Stack, gauge: bool = False) -> Family:
    """Return truncated singular value decompositions of every matrix, W_e ≈ L_e R_e.

    With weighed inputs this is SVD-LLM (arXiv:2403.07378). With ``gauge``, a file stores a square
    part of R_e as the identity: r (out + in − r) numbers.
    """
    root, inverse = roots(given.inputs)
    left, left_inverse = roots(given.outputs)
    u, s, v = torch.linalg.svd(left @ given.matrices @ root, full_matrices=False)
    count, rows, columns = given.matrices.shape
    tails = _tails((s**2).sum(0))
    ranks = range(1, s.shape[1] + 1)
    costs = [count * (rank * (rows + columns) - gauge * rank**2) for rank in ranks]

    def make(rank: int) -> nn.Module:
        first, second = left_inverse @ u[..., :rank] * s[:, None, :rank], v[:, :rank] @ inverse
        return gauged(first, second) if gauge else Product(*map(Whole, balanced(first, second)))

    return Family(given.names, given.matrices.numel(), costs, tails, make, given.whole)


def _tails(values: Tensor) -> list[float]:
    """Return what is left after the first value, the first two values and so on."""
    return [*values.flip(0).cumsum(0).flip(0)[1:].tolist(), 0.0]


def basis_and_own(given: Stack, own_share: float, share: float, turns: int = 4) -> nn.Module:
    """Add low-rank matrices of the experts' own to a shared basis, W_e ≈ L_e C + U_e V_e.

    The two terms take turns. ``own_share`` is the part of the budget for the second one.
    """
    basis = own = None
    for _ in range(turns):
        rest = given.matrices if own is None else given.matrices - own().detach().double()
        basis = shared_family(replace(given, matrices=rest)).largest((1 - own_share) * share)
        rest = given.matrices - basis().detach().double()
        own = owned_family(replace(given, matrices=rest), gauge=True).largest(own_share * share)
    assert basis is not None
    assert own is not None
    return Sum(basis, own)


def gauged(first: Tensor, second: Tensor) -> nn.Module:
    """Turn the bond such that some columns of the second factor are those of the identity.

    A QR decomposition with pivoting chooses them: an interpolative decomposition (Cheng, Gimbutas,
    Martinsson, Rokhlin, SIAM J. Sci. Comput. 26, 1389 (2005)).
    """
    rank = second.shape[1]
    rest, order = [], []
    for matrix in second.numpy():
        pivots = qr(matrix, mode="r", pivoting=True)[1]
        chosen, others = np.sort(pivots[:rank]), np.sort(pivots[rank:])
        rest.append(np.linalg.solve(matrix[:, chosen], matrix[:, others]))
        order.append(np.argsort(np.concatenate([chosen, others])))
    places = torch.from_numpy(np.stack(order))
    kept = places.argsort(1)[:, :rank]
    square = second.gather(2, kept[:, None].expand(-1, rank, -1))
    return Product(Whole(first @ square), Gauged(Whole(torch.from_numpy(np.stack(rest))), places))


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give two factors (E, out, r), (E, r, in) equal singular values; their product stays."""
    q, r = torch.linalg.qr(first)
    u, s, v = torch.linalg.svd(r @ second, full_matrices=False)
    rank = first.shape[-1]
    root = s[..., :rank].sqrt()
    return q @ (u[..., :rank] * root[..., None, :]), root[..., :, None] * v[..., :rank, :]


def shared_family(given: Stack) -> Family:
    """Return the layout ``hidden`` of two sites, W_e ≈ L_e C; for ``down`` W_e ≈ C R_e.

    The common side has one metric, the sum over experts. With it the result is the best one there
    is (Eckart and Young), in absolute errors. The owned factors then fit the experts' own metrics.
    """
    if given.names == ("down",):
        flipped = Stack(given.names, given.matrices.mT, given.outputs, given.inputs)
        return _shared_inputs(flipped, given, mirrored=True)
    return _shared_inputs(given, given, mirrored=False)


def _shared_inputs(flipped: Stack, given: Stack, mirrored: bool) -> Family:
    count, rows, columns = flipped.matrices.shape
    root, inverse = roots(flipped.inputs.mean(0))
    left, _ = roots(flipped.outputs)
    weighed = (left @ flipped.matrices @ root).flatten(0, 1)
    values, vectors = torch.linalg.eigh(weighed.mT @ weighed)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # Metrics of inputs are sums over slots of single experts: the mean is what each of them has.
    tails = _tails(values)
    costs = [rank * (count * rows + columns) for rank in range(1, columns + 1)]

    def make(rank: int) -> nn.Module:
        basis = torch.linalg.qr(inverse @ vectors[:, :rank])[0].mT
        seen = damped(flipped.inputs) @ basis.mT
        owned = torch.linalg.solve(basis @ seen, (flipped.matrices @ seen).mT).mT
        if mirrored:
            return Product(Whole(basis.mT[None]), Whole(owned.mT))
        return Product(Whole(owned), Whole(basis[None]))

    return Family(given.names, given.matrices.numel(), costs, tails, make, given.whole)


def take(form: nn.Module, given: Stack, layer: Layer) -> dict[str, nn.Module]:
    """Give every matrix of a stack its part of the stack's form."""
    names, experts, units = given.names, len(layer.up), layer.up.shape[1]
    if len(names) == 1:
        return {names[0]: form}
    size, axis = (experts, 0) if len(given.matrices) > experts else (units, 1)
    return {name: Part(form, number * size, size, axis) for number, name in enumerate(names)}


def uniform(families: Sequence[Sequence[Family]], share: float) -> list[list[nn.Module]]:
    """Give every stack of every layer the same share of its numbers."""
    return [[family.largest(share) for family in layer] for layer in families]


def distributed(families: Sequence[Sequence[Family]], share: float) -> list[list[nn.Module]]:
    """Spend the numbers of the whole model where the predicted loss falls most."""
    flat = [family for layer in families for family in layer]
    budget = int(share * sum(family.full for family in flat))
    scale = sum(family.errors[0] for family in flat) or 1.0
    options = [[(cost, error / scale) for cost, error in each.options()] for each in flat]
    choices = iter(distribute_budget(options, budget))
    return [[family.choose(next(choices)) for family in layer] for layer in families]
