"""Rows times matrices of low rank that are stored as outer · [1 inner], every one of its own rank.

The factors of all experts lie one after the other, without gaps, since their ranks differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnmoe.nn.compute.slots import Groups, blocks_of
from tnmoe.nn.transforms import cast, has_values, needs_native_operators, without_autocast


@dataclass(frozen=True)
class Factors:
    """The factors of E matrices W_e = L_e · [1 T_e] · P_e, where P_e permutes inputs.

    Attributes
    ----------
    outer : Tensor, shape (sum of ranks, out)
        The transposes of L_e.
    inner : Tensor, shape (sum of r · (in − r),)
        T_e row by row, one expert after the other.
    columns : Tensor of int32, shape (E, in)
        Which input every column of [1 T_e] stands for.
    ranks : sequence of int
        Rank r of every expert.
    """

    outer: Tensor
    inner: Tensor
    columns: Tensor
    ranks: Sequence[int]

    def split(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the transpose of L_e, (r, out), and T_e, (r, in − r), of every expert.

        The gradient of a split is one tensor. That of a slice would be as large for every expert.
        """
        width = self.columns.shape[1]
        inner = self.inner.split(inner_sizes(self.ranks, width))
        parts = zip(inner, self.ranks, strict=True)
        return list(self.outer.split(list(self.ranks))), [
            part.view(rank, width - rank) for part, rank in parts
        ]

    def matrices(self) -> Tensor:
        """Return the matrices of all experts, (E, out, in)."""
        outer, inner = self.split()
        # Where the column of every input stands in [1 T_e].
        places = self.columns.argsort(1)
        with without_autocast(self.outer.device):
            return torch.stack(
                [
                    _permuted(torch.cat([left.T, left.T @ right], 1), place)
                    for left, right, place in zip(outer, inner, places, strict=True)
                ]
            )

    def mask_unused(self, used: Tensor) -> Factors:
        """Replace the numbers of experts by zeros where ``used``, (E,) of bool, is false.

        Otherwise NaN times the zeros in the gradient of an unused matrix would be gradients.
        """
        outer, inner = (
            torch.cat(
                [torch.where(one, part.flatten(), 0) for one, part in zip(used, parts, strict=True)]
            )
            for parts in self.split()
        )
        return Factors(outer.view_as(self.outer), inner, self.columns, self.ranks)


def inner_sizes(ranks: Sequence[int], in_features: int) -> list[int]:
    """Return how many numbers T_e, (r, in − r), has, for every expert."""
    return [rank * (in_features - rank) for rank in ranks]


def low_rank_linear(rows: Tensor, factors: Factors, groups: Groups) -> Tensor:
    """Multiply rows by their experts' matrices: (N, in) → (N, out).

    Parameters
    ----------
    rows : Tensor, shape (N, in)
        In the order of experts.
    factors : Factors
        In any dtype.
    groups : Groups
        Which rows belong to which expert. An accelerator waits for them.

    Notes
    -----
    ``torch.compile`` sees one operator and need not know how many rows each expert has.
    """
    opaque = torch.compiler.is_compiling() or not has_values(rows)
    # Without a single row the gradients of the factors must be zeros, and not None.
    if not opaque and (needs_native_operators() or groups.blocks):
        return _multiply(rows, factors, groups.blocks)
    outer, inner = cast(factors.outer, rows.dtype), cast(factors.inner, rows.dtype)
    return torch.ops.tnmoe.low_rank_linear(
        rows, outer, inner, factors.columns, groups.offsets, list(factors.ranks)
    )


def _multiply(rows: Tensor, factors: Factors, blocks: Sequence[tuple[int, slice]]) -> Tensor:
    """Multiply by one expert's factors after the other's, with torch's own operators."""
    outers, inners = factors.split()
    lengths = [block.stop - block.start for _, block in blocks]
    unrouted, results = len(rows) - sum(lengths), []
    parts = rows.split([*lengths, unrouted])[:-1]
    with without_autocast(rows.device):
        for (expert, _), part in zip(blocks, parts, strict=True):
            inner = cast(inners[expert], rows.dtype)
            own, rest = _permuted(part, factors.columns[expert]).split(list(inner.shape), 1)
            results.append(torch.addmm(own, rest, inner.T) @ cast(outers[expert], rows.dtype))
    return torch.cat([*results, rows.new_zeros(unrouted, factors.outer.shape[1])])


def _permuted(rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``rows[:, columns]`` for a permutation; the gradient is permuted back."""
    if torch.is_grad_enabled() and not needs_native_operators():
        return _Permuted.apply(rows, columns)
    return rows.index_select(1, columns)


class _Permuted(torch.autograd.Function):
    """A selection of columns, without the slow scattered addition that is its gradient in torch."""

    @staticmethod
    def forward(ctx, rows, columns):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(columns)
        return rows.index_select(1, columns)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (columns,) = ctx.saved_tensors
        return _permuted(grad, columns.argsort()), None


@torch.library.custom_op("tnmoe::low_rank_linear", mutates_args=())
def _low_rank_linear(
    rows: Tensor,
    outer: Tensor,
    inner: Tensor,
    columns: Tensor,
    offsets: Tensor,
    ranks: Sequence[int],
) -> Tensor:
    return _multiply(rows, Factors(outer, inner, columns, ranks), list(blocks_of(offsets)))


@torch.library.custom_op("tnmoe::low_rank_linear_backward", mutates_args=())
def _low_rank_linear_backward(
    grad: Tensor, rows: Tensor, tensors: Sequence[Tensor], offsets: Tensor, ranks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    outer, inner, columns = tensors
    found = torch.zeros_like(rows), torch.zeros_like(outer), torch.zeros_like(inner)
    outers, inners = Factors(outer, inner, columns, ranks).split()
    grad_outers, grad_inners = Factors(found[1], found[2], columns, ranks).split()
    with without_autocast(rows.device):
        for expert, block in blocks_of(offsets):
            order, inner, slope = columns[expert], inners[expert], grad[block]
            own, rest = rows[block].index_select(1, order).split(list(inner.shape), 1)
            torch.mm(torch.addmm(own, rest, inner.T).T, slope, out=grad_outers[expert])
            slope = slope @ outers[expert].T
            torch.mm(slope.T, rest, out=grad_inners[expert])
            permuted = torch.cat([slope, slope @ inner], 1)
            found[0][block] = permuted.index_select(1, order.argsort())
    return found


@_low_rank_linear.register_fake
def _(rows, outer, inner, columns, offsets, ranks):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], outer.shape[1])


@_low_rank_linear_backward.register_fake
def _(grad, rows, tensors, offsets, ranks):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(each) for each in (rows, *tensors[:2]))


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.ranks = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    rows, *tensors, offsets = ctx.saved_tensors
    found = torch.ops.tnmoe.low_rank_linear_backward(grad, rows, tensors, offsets, ctx.ranks)
    return *found, None, None, None


_low_rank_linear.register_autograd(_backward, setup_context=_save_inputs)
