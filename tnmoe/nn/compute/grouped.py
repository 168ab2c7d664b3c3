"""Rows grouped by expert, and the product of every group with its own expert's matrix.

Rows may be matrices (k, n) instead of vectors (k,): the chain of cores in :mod:`in_order` then
needs no permutation, the columns being legs that were contracted before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.contraction.expert_routes import WIDE
from tnmoe.nn.compute.half_precision import is_half
from tnmoe.nn.transforms import has_values, is_under_dispatch_mode, needs_native_operators


@dataclass(frozen=True)
class Groups:
    """Slots (token, choice) sorted by expert: every expert's rows lie side by side.

    Attributes
    ----------
    experts : Tensor of int64, shape (rows,)
        Expert of every row.
    offsets : Tensor of int32, shape (E,)
        Where the rows of every expert end. On an accelerator they stay there.
    rows : int
        Number of slots of the layer, which its routes are planned for.
    order : Tensor of int64, shape (rows,)
        Slot at every row.
    inverse : Tensor of int64, shape (rows,)
        Row of every slot.

    Examples
    --------
    >>> groups = Groups.of(torch.tensor([2, 0, 2]), num_experts=3)
    >>> groups.experts, groups.order
    (tensor([0, 2, 2]), tensor([1, 0, 2]))
    >>> groups.offsets.tolist()
    [1, 1, 3]
    """

    experts: Tensor = field(repr=False)
    offsets: Tensor
    rows: int
    order: Tensor = field(repr=False)
    inverse: Tensor = field(repr=False)

    @classmethod
    def of(cls, expert_of_slot: Tensor, num_experts: int) -> Groups:
        """Sort slots by their experts.

        Parameters
        ----------
        expert_of_slot : Tensor of int64, shape (rows,)
            Token by token, choice by choice.
        num_experts : int
            Number of experts E; a slot of that number has none, and comes last.
        """
        rows = expert_of_slot.shape[0]
        experts, order = expert_of_slot.sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(rows, device=order.device)
        # Unlike bincount, a search in the sorted list is deterministic and waits for nothing.
        every = torch.arange(num_experts, device=order.device)
        ends = torch.searchsorted(experts, every, right=True)
        return cls(experts, ends.to(torch.int32), rows, order, inverse)

    @property
    def visited(self) -> Tensor:
        """Experts that have rows, (E,) of bool, found without a wait for an accelerator."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)) > 0

    def first(self, rows: int) -> Groups:
        """The first ``rows`` rows alone, without what leads to and from slots."""
        return replace(self.part(0, rows), rows=rows)

    def part(self, start: int, stop: int) -> Groups:
        """Rows from ``start`` to ``stop`` alone, without what leads to and from slots.

        Routes stay those that are planned for all rows.
        """
        alone = torch.arange(stop - start, device=self.order.device)
        ends = self.offsets.clamp(start, stop) - start
        return Groups(self.experts[start:stop], ends, self.rows, alone, alone)

    @cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """Experts that have rows, and which. Waits for an accelerator."""
        return list(blocks_of(self.offsets))

    def apart(self) -> Iterator[tuple[slice, Groups]]:
        """Rows of every expert that has any, and groups of which only that one has rows."""
        for _, block in self.spans:
            yield block, self.part(block.start, block.stop)


@dataclass(frozen=True)
class Visits:
    """Which tokens go to which experts as a table, where code may not depend on such numbers.

    Every expert then has a row for every token: zeros where it was not chosen.

    Attributes
    ----------
    chosen : Tensor of bool, shape (T, E, 1)
    weights : Tensor, shape (T, E)
        Of every expert in a token's sum.
    """

    chosen: Tensor
    weights: Tensor

    @classmethod
    def of(cls, index: Tensor, weights: Tensor, num_experts: int) -> Visits:
        """From experts and weights of tokens, (T, k) both; an expert that there is not is none."""
        chosen = index[..., None] == torch.arange(num_experts, device=index.device)
        return cls(chosen.any(1)[..., None], torch.where(chosen, weights[..., None], 0).sum(1))

    @property
    def visited(self) -> Tensor:
        """Experts that have tokens, (E,) of bool."""
        return self.chosen[..., 0].any(0)

    def spread(self, states: Tensor) -> Tensor:
        """A row of every token for every expert: (T, H) → (T, E, H)."""
        return self.cleared(states[:, None])

    def cleared(self, rows: Tensor) -> Tensor:
        """Rows (T, E, n) with zeros where an expert was not chosen, and so are the gradients."""
        return torch.where(self.chosen, rows, 0)

    def collect(self, outputs: Tensor) -> Tensor:
        """Every token's weighted sum of outputs (T, E, H)."""
        return (self.cleared(outputs) * self.weights[..., None]).sum(1)


def spread(states: Tensor, order: Tensor, inverse: Tensor, choices: int = 1) -> Tensor:
    """Every slot's token, in the order of the rows: (T, H) → (T · choices, H).

    As indexing with ``order // choices``, but the gradient is no scattered addition: it goes the
    way back along ``inverse``.
    """
    if torch.is_grad_enabled() and not needs_native_operators():
        return _Spread.apply(states, order, inverse, choices)
    return states.index_select(0, order // choices if choices > 1 else order)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, order, inverse, choices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        ctx.choices = choices
        return states.index_select(0, order // choices if choices > 1 else order)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Collect.apply(grad, *ctx.saved_tensors, ctx.choices), None, None, None


class _Collect(torch.autograd.Function):
    """Adjoint of spread: every token's sum over its slots."""

    @staticmethod
    def forward(ctx, rows, order, inverse, choices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        ctx.choices = choices
        slots = rows.index_select(0, inverse)
        return slots.view(-1, choices, rows.shape[1]).sum(1) if choices > 1 else slots

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.choices), None, None, None


def cleared(rows: Tensor, nowhere: Tensor | None) -> Tensor:
    """Rows (T, …) with zeros where ``nowhere`` (T,) is true; so are their gradients.

    A product with 0 would let NaN and infinity pass.
    """
    if nowhere is None:
        return rows
    return rows.masked_fill(nowhere.view(-1, *[1] * (rows.ndim - 1)), 0)


def per_row(table: Tensor, groups: Groups) -> Tensor:
    """Every row's expert's entry of a table, (E, n) → (T, n).

    As indexing with ``groups.experts``, but the gradient is no scattered addition: the rows of an
    expert lie side by side.
    """
    if needs_native_operators() or not torch.is_grad_enabled():
        return _entries(table, groups.experts)
    return torch.ops.tnmoe.per_row(table, groups.experts, groups.offsets)


def _entries(table: Tensor, experts: Tensor) -> Tensor:
    # Rows without an expert come last, and are of no use.
    return table.index_select(0, experts.clamp(max=len(table) - 1))


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Product of each block of rows with its own matrix.

    Parameters
    ----------
    rows : Tensor, shape (T, in) or (T, in, n)
        Sorted by expert. With columns, every row is a matrix whose columns are multiplied.
    weight : Tensor, shape (E, out, in)
        One matrix per expert, in the dtype of ``rows``.
    offsets : Tensor of int32, shape (E,)
        Where the block of every expert ends.

    Returns
    -------
    Tensor, shape (T, out) or (T, out, n)

    Notes
    -----
    One operator to ``torch.compile``, which need not know how many rows each expert has.
    """
    if needs_native_operators():
        return _linear_apart(rows, weight, offsets)
    opaque = torch.compiler.is_compiling() or is_under_dispatch_mode() or not has_values(rows)
    if torch.is_grad_enabled() or opaque:
        return torch.ops.tnmoe.grouped_linear(rows, weight, offsets)
    # What an operator brings with it costs more than the product of a few rows.
    return multiply_groups(rows, weight, offsets)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """leftᵀ · right of every block of rows: (T, out), (T, in) → (E, out, in).

    Columns, (T, out, n) and (T, in, n), are summed over as well.
    """
    if needs_native_operators():
        return _outer_apart(left, right, offsets)
    return torch.ops.tnmoe.grouped_outer(left, right, offsets)


def _linear_apart(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """:func:`grouped_linear` in torch's own operators."""
    columns = rows if rows.ndim == 3 else rows[..., None]
    blocks = [weight[expert] @ columns[block] for expert, block in blocks_of(offsets)]
    routed = sum(map(len, blocks))
    rest = columns.new_zeros(len(rows) - routed, weight.shape[1], columns.shape[2])
    result = torch.cat([*blocks, rest])
    return result if rows.ndim == 3 else result[..., 0]


def _outer_apart(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """:func:`grouped_outer` in torch's own operators."""
    zero = left.new_zeros(left.shape[1], right.shape[1])
    blocks = {
        expert: torch.tensordot(left[block], right[block], [[0, *range(2, left.ndim)]] * 2)
        for expert, block in blocks_of(offsets)
    }
    return torch.stack([blocks.get(expert, zero) for expert in range(len(offsets))])


def multiply_groups(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What :func:`grouped_linear` computes, without a gradient."""
    if rows.ndim == 3 and _on_cuda(rows):
        # Memory is fast there, and a grouped product is one launch.
        count, depth, columns = rows.shape
        flat = rows.mT.reshape(count * columns, depth)
        result = multiply_groups(flat, weight, offsets * columns)
        return result.view(count, columns, -1).mT.contiguous()
    if _has_kernel(rows, weight):
        return F.grouped_mm(rows, weight.mT, offs=offsets)
    result = rows.new_empty(rows.shape[0], weight.shape[1], *rows.shape[2:])
    for expert, block in blocks_of(offsets):
        multiply_block(rows[block], weight[expert], result[block])
    return result


_grouped_linear = torch.library.custom_op("tnmoe::grouped_linear", multiply_groups, mutates_args=())


@torch.library.custom_op("tnmoe::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if left.ndim == 3 and _on_cuda(left):
        flat = (_rows_of_columns(each) for each in (left, right))
        return _grouped_outer(*flat, offsets * left.shape[2])
    if _has_kernel(left, right):
        return F.grouped_mm(left.T, right, offs=offsets)
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, block in blocks_of(offsets):
        outer_block(left[block], right[block], result[expert])
    return result


@torch.library.custom_op("tnmoe::per_row", mutates_args=())
def _per_row(table: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    return _entries(table, experts)


@torch.library.custom_op("tnmoe::grouped_sum", mutates_args=())
def _grouped_sum(rows: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows of every expert, (T, n) → (E, n): the adjoint of ``per_row``."""
    if _on_cuda(rows):
        # As a product, whose kernel neither waits nor adds in an order of its own.
        ones = rows.new_ones(len(rows), 16 // rows.element_size())
        return _grouped_outer(rows, ones, offsets)[..., 0].contiguous()
    result = rows.new_zeros(len(offsets), rows.shape[1])
    for expert, block in blocks_of(offsets):
        torch.sum(rows[block], 0, out=result[expert])
    return result


def multiply_block(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Rows (t, in) or (t, in, n) times a matrix (out, in), into ``out``."""
    if rows.ndim == 2:
        torch.mm(rows, matrix.T, out=out)
    elif rows.shape[2] >= WIDE:
        torch.bmm(matrix.expand(len(rows), -1, -1), rows, out=out)
    else:
        count, depth, columns = rows.shape
        product = rows.mT.reshape(count * columns, depth) @ matrix.T
        out.copy_(product.view(count, columns, -1).mT)


def outer_block(left: Tensor, right: Tensor, out: Tensor) -> None:
    """leftᵀ · right of (t, out) and (t, in), or of (t, out, n) and (t, in, n), into ``out``."""
    if left.ndim == 2:
        torch.mm(left.T, right, out=out)
    elif is_half(left.dtype):
        # One product, in which torch adds up in float32: sums of several would be rounded at each.
        torch.mm(_rows_of_columns(left).T, _rows_of_columns(right), out=out)
    else:
        _outer_block_in_pieces(left, right, out)


def _outer_block_in_pieces(left: Tensor, right: Tensor, out: Tensor) -> None:
    (count, rows, columns), depth = left.shape, right.shape[1]
    step = _PIECE // (rows * depth)
    if step > 1:
        # A sum of small products over rows, several at a time, in memory that stays in a cache.
        sums = left.new_zeros(min(step, count), rows, depth)
        for some, others in zip(left.split(step), right.split(step), strict=True):
            sums[: len(some)].baddbmm_(some, others.mT)
        torch.sum(sums, 0, out=out)
        return
    out.zero_()
    step = max(1, _PIECE // (columns * (rows + depth)))
    for some, others in zip(left.split(step), right.split(step), strict=True):
        out.addmm_(_rows_of_columns(some).T, _rows_of_columns(others))


def _rows_of_columns(matrices: Tensor) -> Tensor:
    """(t, k, n) → (t · n, k)."""
    return matrices.mT.reshape(-1, matrices.shape[1])


# Numbers that fit a core's cache.
_PIECE = 1 << 17


def _on_cuda(array: Tensor) -> bool:
    return array.is_cuda


def _has_kernel(*arrays: Tensor) -> bool:
    """Whether torch's grouped kernel takes these."""
    if not hasattr(F, "grouped_mm") or not _on_cuda(arrays[0]):
        return False
    return arrays[0].dtype in (torch.bfloat16, torch.float16) and all(map(_is_aligned, arrays))


def _is_aligned(array: Tensor) -> bool:
    """Whether matrices, or their transposes, lie in rows of whole 16 bytes."""
    lying = array if array.is_contiguous() else array.mT
    return lying.is_contiguous() and lying.shape[-1] * lying.element_size() % 16 == 0


def blocks_of(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which. Waits for an accelerator."""
    for expert, (start, stop) in enumerate(pairwise([0, *offsets.tolist()])):
        if stop > start:
            yield expert, slice(start, stop)


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1], *rows.shape[2:])


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


@_per_row.register_fake
def _(table: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    return table.new_empty(experts.shape[0], table.shape[1])


@_grouped_sum.register_fake
def _(rows: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], rows.shape[1])


def _keep_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows, weight, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    rows, weight, offsets = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        grouped_linear(grad, weight.mT, offsets) if wanted[0] else None,
        grouped_outer(grad, rows, offsets) if wanted[1] else None,
        None,
    )


def _keep_outer(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    left, right, offsets = inputs
    ctx.save_for_backward(left, right, offsets)


def _outer_backward(ctx, grad):  # type: ignore[no-untyped-def]
    left, right, offsets = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        grouped_linear(right, grad, offsets) if wanted[0] else None,
        grouped_linear(left, grad.mT, offsets) if wanted[1] else None,
        None,
    )


def _keep_places(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _per_row_backward(ctx, grad):  # type: ignore[no-untyped-def]
    experts, offsets = ctx.saved_tensors
    if needs_native_operators():
        ones = grad.new_ones(len(grad), 1)
        return _outer_apart(grad, ones, offsets)[..., 0], None, None
    return torch.ops.tnmoe.grouped_sum(grad, experts, offsets), None, None


def _grouped_sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
    experts, offsets = ctx.saved_tensors
    if needs_native_operators():
        return _entries(grad, experts), None, None
    return torch.ops.tnmoe.per_row(grad, experts, offsets), None, None


_per_row.register_autograd(_per_row_backward, setup_context=_keep_places)
_grouped_sum.register_autograd(_grouped_sum_backward, setup_context=_keep_places)
_grouped_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
_grouped_outer.register_autograd(_outer_backward, setup_context=_keep_outer)
