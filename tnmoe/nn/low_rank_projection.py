"""Matrices of low rank that experts own, every expert with a rank of its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.contraction.layer_plan import Work
from tnmoe.errors import InputError, check_int_from_zero, short_repr
from tnmoe.nn.compute.low_rank import Factors, inner_sizes, low_rank_linear
from tnmoe.nn.compute.once_per_token import Load
from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.nn.projection import Bias, Projection


class LowRankProjection(Projection):
    """Matrices W_e = L_e · [1 T_e] · P_e of low rank, which experts share nothing of.

    P_e permutes the inputs, such that L_e consists of r columns of W_e: an interpolative
    decomposition (Cheng et al., SIAM J. Sci. Comput. 26, 2005, section 3). The identity 1 is not
    stored. A matrix therefore has r · (out + in − r) numbers, never more than the whole one.

    Parameters
    ----------
    num_experts, out_features, in_features, bias, device, dtype
        As for :class:`Projection`.
    ranks : sequence of int
        Rank r of every expert's matrix, from 0 to the smaller one of ``out`` and ``in``.

    Attributes
    ----------
    outer : Parameter, shape (sum of ranks, out)
        The rows of an expert are the transpose of L_e, (out, r).
    inner : Parameter, shape (sum of r · (in − r),)
        T_e, (r, in − r), row by row, one expert after the other.
    columns : Tensor of int32, shape (E, in)
        Which input every column of [1 T_e] stands for. Each half is in ascending order.

    Raises
    ------
    InputError
        If a size is not a positive integer, or ``ranks`` are not one per expert in their range.

    Examples
    --------
    >>> matrices = LowRankProjection(3, out_features=16, in_features=8, ranks=[2, 0, 5])
    >>> torch.linalg.matrix_rank(matrices.weight())
    tensor([2, 0, 5])
    >>> matrices.outer.shape, matrices.inner.shape
    (torch.Size([7, 16]), torch.Size([27]))
    """

    outer: nn.Parameter
    inner: nn.Parameter
    columns: Tensor

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        ranks: Sequence[int],
        *,
        bias: Bias = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts, out_features, in_features, bias=bias, device=device, dtype=dtype
        )
        self.ranks = check_ranks(ranks, self.out_features, self.in_features)
        if len(self.ranks) != self.num_experts:
            raise InputError(
                f"ranks must be one per expert: got {len(self.ranks)} for {self.num_experts}"
            )
        for name, size in (
            ("outer", (sum(self.ranks), self.out_features)),
            ("inner", (sum(self._inner_sizes),)),
        ):
            numbers = torch.empty(size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(numbers))
        columns = torch.empty(self.num_experts, self.in_features, device=device, dtype=torch.int32)
        self.register_buffer("columns", columns)
        self.reset_parameters()

    @classmethod
    def from_factors(cls, factors: Sequence[Any]) -> LowRankProjection:
        """Take over the factors of all experts.

        Parameters
        ----------
        factors : sequence of LowRankFactors
            One per expert, of torch tensors: ``outer`` (out, r), ``inner`` (r, in − r) and
            ``columns`` (in,), the inputs that the columns of [1 inner] stand for.

        Raises
        ------
        InputError
            If there is none, or they are for matrices of different sizes, or the columns of one
            are not all inputs, each once.

        Examples
        --------
        >>> from types import SimpleNamespace
        >>> columns, inner = torch.tensor([1, 0, 2]), torch.tensor([[5.0, 6.0]])
        >>> one = SimpleNamespace(outer=torch.ones(2, 1), inner=inner, columns=columns)
        >>> LowRankProjection.from_factors([one]).weight()[0]
        tensor([[5., 1., 6.],
                [5., 1., 6.]], grad_fn=<SelectBackward0>)
        """
        if not factors:
            raise InputError("factors must be those of one expert at least, got none")
        out, in_ = len(factors[0].outer), len(factors[0].columns)
        for expert, each in enumerate(factors):
            _check_factors(each, expert, out, in_)
        ranks, dtype = [len(each.inner) for each in factors], factors[0].outer.dtype
        projection = cls(len(factors), out, in_, ranks, device="meta", dtype=dtype)
        with torch.no_grad():
            projection.outer = nn.Parameter(torch.cat([each.outer.mT for each in factors]))
            projection.inner = nn.Parameter(torch.cat([each.inner.flatten() for each in factors]))
        columns = torch.stack([torch.as_tensor(each.columns) for each in factors])
        projection.columns = columns.to(projection.outer.device, torch.int32)
        return projection

    @property
    def _inner_sizes(self) -> list[int]:
        return inner_sizes(self.ranks, self.in_features)

    @property
    def _factors(self) -> Factors:
        return Factors(self.outer, self.inner, self.columns, self.ranks)

    def weight(self) -> Tensor:
        return self._factors.matrices()

    def _masked_weight(self, groups: Groups | DenseDispatch) -> Tensor:
        return self._factors.mask_unused(groups.used).matrices()

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        return low_rank_linear(rows, self._factors, groups)

    def work_of_call(self, load: Load) -> Work:
        # Experts have different ranks. A slot takes the mean of them.
        sizes = self.out_features + self.in_features
        numbers = sum(rank * (sizes - rank) for rank in self.ranks) / self.num_experts
        return Work(
            "low-rank factors", "slot", 2 * numbers, 0, round(numbers * self.outer.element_size())
        )

    def expert_rows(self, expert: int) -> dict[str, slice]:
        inner, columns = self._inner_sizes, slice(expert, expert + 1)
        first = sum(self.ranks[:expert]), sum(inner[:expert])
        factors = {
            "outer": slice(first[0], first[0] + self.ranks[expert]),
            "inner": slice(first[1], first[1] + inner[expert]),
        }
        return super().expert_rows(expert) | factors | {"columns": columns}

    def _keep_experts(self, experts: Sequence[int]) -> None:
        super()._keep_experts(experts)
        self.ranks = tuple(self.ranks[expert] for expert in experts)

    @property
    def owned_parameters(self) -> list[nn.Parameter]:
        """The factors, which experts own as they own cores."""
        return [self.outer, self.inner]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new factors, such that the numbers of all columns have the variance 1 / (3·in)."""
        bound = 1 / sqrt(self.in_features)
        self.outer.uniform_(-bound, bound)
        for part, rank in zip(self.inner.split(self._inner_sizes), self.ranks, strict=True):
            # A sum of r products with numbers of variance 1 / r keeps the variance.
            spread = sqrt(3 / max(rank, 1))
            part.uniform_(-spread, spread)
        self.columns.copy_(torch.arange(self.in_features))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"{super().extra_repr()}, ranks={low if low == high else f'{low}…{high}'}"


def check_ranks(ranks: Sequence[int], out_features: int, in_features: int) -> tuple[int, ...]:
    """Return the ranks of matrices (out, in) as a tuple; raise an InputError if one is too large.

    Parameters
    ----------
    ranks : sequence of int
    out_features, in_features : int
    """
    try:
        found = tuple(check_int_from_zero("every rank", rank) for rank in ranks)
    except TypeError as error:
        raise InputError(f"ranks must be integers, got {short_repr(ranks)}") from error
    most = min(out_features, in_features)
    if max(found, default=0) > most:
        raise InputError(
            f"a {out_features}×{in_features} matrix has a rank of {most} at most, got {max(found)}"
        )
    return found


def _check_factors(factors: Any, expert: int, out: int, in_: int) -> None:
    """Raise an InputError if the factors of an expert are not those of an (out, in) matrix."""
    rank = len(factors.inner)
    found = [tuple(each.shape) for each in (factors.outer, factors.inner, factors.columns)]
    if found != [(out, rank), (rank, in_ - rank), (in_,)]:
        raise InputError(
            f"factors of expert {expert} must be outer (out, r), inner (r, in - r) and columns "
            f"(in,) of a {out}×{in_} matrix, got {', '.join(map(str, found))}"
        )
    if sorted(factors.columns.tolist()) != list(range(in_)):
        raise InputError(f"columns of expert {expert} must be all inputs from 0 to {in_ - 1}, once")
