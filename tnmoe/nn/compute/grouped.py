"""Products of grouped rows: every row with the matrix of its own expert.

Rows may be matrices (k, n) instead of vectors (k,). The kernel of :mod:`tnmoe.nn.compute.joint`
then needs no permutation: the columns are legs that were contracted before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.contraction.expert_routes import WIDE
from tnmoe.nn.compute.half_precision import is_half
from tnmoe.nn.compute.slots import SlotOrder, UnsortedSlots, blocks_of
from tnmoe.nn.transforms import (
    has_values,
    is_under_dispatch_mode,
    needs_native_operators,
    values_are_readable,
)

# Numbers that fit into the own cache of one core of a CPU.
_L2_CACHE = 1 << 17

# Numbers of selected matrices that are copied for one batched product. More than that, a CPU takes
# row by row from where they are.
_SELECTED = 1 << 19

# Numbers of results up to which a CPU takes torch's grouped kernel. It returns new memory, and
# much of that costs more than the calls that the kernel saves.
_SMALL_RESULT = 1 << 20

# On an accelerator, numbers of matrices that are copied per row rather than looped over.
_GATHERED = 1 << 24

# Torch's grouped kernel takes rows whose size in bytes is a multiple of this.
_ALIGNMENT = 16


def per_row(table: Tensor, groups: SlotOrder) -> Tensor:
    """Look up the entry of every row's expert in a table: (E, n) → (N, n).

    Equal to ``table[groups.experts]``, without the scattered addition that indexing has as its
    gradient: the rows of an expert are adjacent.
    """
    if isinstance(groups, UnsortedSlots):
        return table.index_select(0, groups.experts)
    if needs_native_operators() or not torch.is_grad_enabled():
        return _entries(table, groups.experts)
    return torch.ops.tnmoe.per_row(table, groups.experts, groups.offsets)


def _entries(table: Tensor, experts: Tensor) -> Tensor:
    # Rows without an expert come last; the entries that they get are never read.
    return table.index_select(0, experts.clamp(max=len(table) - 1))


def selected_linear(rows: Tensor, weight: Tensor, slots: UnsortedSlots, factor: int = 1) -> Tensor:
    """Multiply a few rows, in any order, by the matrices of their experts; without gradients.

    Parameters
    ----------
    rows : Tensor, shape (M · factor, in) or (M · factor, in, n)
        ``factor`` rows for every slot, M = N, or for every token, M = T. All slots of a token
        then multiply the rows of the token.
    weight : Tensor, shape (E, out, in)
        One matrix per expert, in the dtype of ``rows``.
    slots : UnsortedSlots
    factor : int

    Returns
    -------
    Tensor, shape (N · factor, out) or (N · factor, out, n)
    """
    experts = slots.experts
    count, (_, out, depth) = experts.shape[0], weight.shape
    is_large = count * out * depth > _SELECTED
    if is_large and values_are_readable(experts) and not needs_native_operators():
        return _multiply_one_by_one(rows, weight, experts, factor)
    given, columns = rows.shape[0] // factor, rows.shape[2:]
    selected = weight.index_select(0, experts)
    if given < count and factor == 1:
        # The matrices of a token's slots, one below the other, are one matrix.
        stacked = selected.view(given, -1, depth)
        return torch.bmm(stacked, rows.view(given, depth, -1)).view(count, out, *columns)
    if given < count:
        choices = count // given
        rows = rows.view(given, 1, factor, *rows.shape[1:]).expand(-1, choices, *[-1] * rows.ndim)
        rows = rows.reshape(count * factor, depth, *columns)
    if not columns:
        return torch.bmm(rows.view(count, factor, depth), selected.mT).view(count * factor, out)
    if factor > 1:
        selected = selected.repeat_interleave(factor, 0)
    return torch.bmm(selected, rows)


def _multiply_one_by_one(rows: Tensor, weight: Tensor, experts: Tensor, factor: int) -> Tensor:
    """Compute :func:`selected_linear` without a copy of any matrix."""
    count = experts.shape[0]
    result = rows.new_empty(count * factor, weight.shape[1], *rows.shape[2:])
    choices = count * factor // rows.shape[0]
    sources = rows.split(factor)
    for slot, (expert, part) in enumerate(zip(experts.tolist(), result.split(factor), strict=True)):
        multiply_block(sources[slot // choices], weight[expert], part)
    return result


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of every expert by its own matrix.

    Parameters
    ----------
    rows : Tensor, shape (N, in) or (N, in, n)
        In the order of experts. With three axes every row is a matrix with n columns.
    weight : Tensor, shape (E, out, in)
        One matrix per expert, in the dtype of ``rows``.
    offsets : Tensor of int32, shape (E,)
        Where the rows of every expert end.

    Returns
    -------
    Tensor, shape (N, out) or (N, out, n)

    Notes
    -----
    ``torch.compile`` sees one operator and need not know how many rows each expert has.
    """
    if needs_native_operators():
        return _native_linear(rows, weight, offsets)
    opaque = torch.compiler.is_compiling() or is_under_dispatch_mode() or not has_values(rows)
    if torch.is_grad_enabled() or opaque:
        return torch.ops.tnmoe.grouped_linear(rows, weight, offsets)
    # The dispatch of an operator costs more than the product of a few rows.
    return multiply_groups(rows, weight, offsets)


def shared_linear(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows with columns by one matrix: (N, in, n), (out, in) → (N, out, n)."""
    if _can_skip_operators(rows):
        return _SharedLinear.apply(rows, matrix)
    return grouped_linear(rows, matrix[None], _one_group(rows))


def _shared_outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum left · rightᵀ over all rows: (N, out, n), (N, in, n) → (out, in)."""
    if _can_skip_operators(left):
        return _SharedOuter.apply(left, right)
    return grouped_outer(left, right, _one_group(left))[0]


def _can_skip_operators(rows: Tensor) -> bool:
    """Return whether a function, which costs less than an operator, may multiply rows."""
    return (
        values_are_readable(rows) and not needs_native_operators() and not is_under_dispatch_mode()
    )


def _one_group(rows: Tensor) -> Tensor:
    return torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, matrix):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, matrix)
        result = rows.new_empty(len(rows), len(matrix), rows.shape[2])
        multiply_block(rows, matrix, result)
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, matrix = ctx.saved_tensors
        needs, grad = ctx.needs_input_grad, grad.contiguous()
        return (
            shared_linear(grad, matrix.mT) if needs[0] else None,
            _shared_outer(grad, rows) if needs[1] else None,
        )


class _SharedOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(left, right)
        result = left.new_empty(left.shape[1], right.shape[1])
        outer_block(left, right, result)
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        left, right = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            shared_linear(right, grad) if needs[0] else None,
            shared_linear(left, grad.mT) if needs[1] else None,
        )


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Compute leftᵀ · right over the rows of every expert: (N, out), (N, in) → (E, out, in).

    With columns, (N, out, n) and (N, in, n), the sum runs over these as well.
    """
    if needs_native_operators():
        return _native_outer(left, right, offsets)
    return torch.ops.tnmoe.grouped_outer(left, right, offsets)


def _native_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Compute :func:`grouped_linear` with torch's own operators."""
    columns = rows if rows.ndim == 3 else rows[..., None]
    blocks = [weight[expert] @ columns[block] for expert, block in blocks_of(offsets)]
    routed = sum(map(len, blocks))
    rest = columns.new_zeros(len(rows) - routed, weight.shape[1], columns.shape[2])
    result = torch.cat([*blocks, rest])
    return result if rows.ndim == 3 else result[..., 0]


def _native_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Compute :func:`grouped_outer` with torch's own operators."""
    zero = left.new_zeros(left.shape[1], right.shape[1])
    blocks = {
        expert: torch.tensordot(left[block], right[block], [[0, *range(2, left.ndim)]] * 2)
        for expert, block in blocks_of(offsets)
    }
    return torch.stack([blocks.get(expert, zero) for expert in range(len(offsets))])


def multiply_groups(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Compute :func:`grouped_linear` without a gradient."""
    if rows.ndim == 3 and _has_kernel_for(rows):
        # Moving the columns is cheap there, and a grouped product is one launch.
        columns = rows.shape[2]
        result = multiply_groups(_columns_as_rows(rows), weight, offsets * columns)
        return result.view(len(rows), columns, weight.shape[1]).mT.contiguous()
    if _has_kernel(rows, weight) or _is_small(rows, weight):
        # The kernel's rows are longer where theirs are no multiple of the alignment.
        return F.grouped_mm(rows, weight.mT, offs=offsets).contiguous()
    if _on_cuda(rows) and len(rows) * weight.shape[1] * weight.shape[2] <= _GATHERED:
        return _multiply_gathered(rows, weight, offsets)
    result = rows.new_empty(rows.shape[0], weight.shape[1], *rows.shape[2:])
    if _on_cuda(rows) and len(weight) == 1:
        # Nothing reads the products of rows without an expert.
        multiply_block(rows, weight[0], result)
        return result
    for expert, block in blocks_of(offsets):
        multiply_block(rows[block], weight[expert], result[block])
    return result


def _multiply_gathered(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply few rows by copies of their matrices, without waiting for an accelerator."""
    numbers = torch.arange(len(rows), dtype=offsets.dtype, device=offsets.device)
    experts = torch.searchsorted(offsets, numbers, right=True)
    matrices = _entries(weight, experts)
    return matrices @ rows if rows.ndim == 3 else (matrices @ rows[..., None])[..., 0]


_grouped_linear = torch.library.custom_op("tnmoe::grouped_linear", multiply_groups, mutates_args=())


@torch.library.custom_op("tnmoe::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if left.ndim == 3 and _has_kernel_for(left):
        columns = left.shape[2]
        return _grouped_outer(_columns_as_rows(left), _columns_as_rows(right), offsets * columns)
    if _has_kernel(left, right):
        return F.grouped_mm(left.T, right, offs=offsets).contiguous()
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, block in blocks_of(offsets):
        outer_block(left[block], right[block], result[expert])
    return result


@torch.library.custom_op("tnmoe::per_row", mutates_args=())
def _per_row(table: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    return _entries(table, experts)


@torch.library.custom_op("tnmoe::grouped_sum", mutates_args=())
def _grouped_sum(rows: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of every expert, (N, n) → (E, n): the adjoint of ``per_row``."""
    if _on_cuda(rows):
        # The kernel of a product neither synchronises nor adds in a random order.
        ones = rows.new_ones(len(rows), _ALIGNMENT // rows.element_size())
        return _grouped_outer(rows, ones, offsets)[..., 0].contiguous()
    result = rows.new_zeros(len(offsets), rows.shape[1])
    for expert, block in blocks_of(offsets):
        torch.sum(rows[block], 0, out=result[expert])
    return result


def multiply_block(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write rows (t, in) or (t, in, n) times a matrix (out, in) into ``out``."""
    if rows.ndim == 2:
        torch.mm(rows, matrix.T, out=out)
    elif rows.shape[2] >= WIDE:
        torch.bmm(matrix.expand(len(rows), -1, -1), rows, out=out)
    else:
        count, depth, columns = rows.shape
        product = rows.mT.reshape(count * columns, depth) @ matrix.T
        out.copy_(product.view(count, columns, len(matrix)).mT)


def outer_block(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write leftᵀ · right into ``out``: of (t, out) and (t, in), or (t, out, n) and (t, in, n)."""
    if left.ndim == 2:
        torch.mm(left.T, right, out=out)
    elif is_half(left.dtype):
        # Torch sums one product in float32. A sum of several products would round each of them.
        torch.mm(_columns_as_rows(left).T, _columns_as_rows(right), out=out)
    else:
        _outer_block_in_pieces(left, right, out)


def _outer_block_in_pieces(left: Tensor, right: Tensor, out: Tensor) -> None:
    (count, rows, columns), depth = left.shape, right.shape[1]
    step = _L2_CACHE // (rows * depth)
    if step > 1:
        # Sum the small products of several rows at a time, in memory that stays in a cache.
        sums = left.new_zeros(min(step, count), rows, depth)
        for lefts, rights in zip(left.split(step), right.split(step), strict=True):
            sums[: len(lefts)].baddbmm_(lefts, rights.mT)
        torch.sum(sums, 0, out=out)
        return
    out.zero_()
    step = max(1, _L2_CACHE // (columns * (rows + depth)))
    for lefts, rights in zip(left.split(step), right.split(step), strict=True):
        out.addmm_(_columns_as_rows(lefts).T, _columns_as_rows(rights))


def _columns_as_rows(matrices: Tensor) -> Tensor:
    """Turn the columns of matrices into rows: (t, k, n) → (t · n, k)."""
    return matrices.mT.reshape(-1, matrices.shape[1])


def _on_cuda(array: Tensor) -> bool:
    return array.is_cuda


def _has_kernel(*arrays: Tensor) -> bool:
    """Return whether torch's grouped kernel takes these arrays."""
    return _has_kernel_for(arrays[0]) and all(map(_is_aligned, arrays))


def _has_kernel_for(array: Tensor) -> bool:
    """Return whether torch has a grouped kernel for the device and the dtype of an array.

    For other dtypes torch, too, loops over the groups.
    """
    return hasattr(F, "grouped_mm") and _on_cuda(array) and array.dtype == torch.bfloat16


def _is_small(rows: Tensor, weight: Tensor) -> bool:
    """Return whether a CPU's product of these arrays is small, and torch's kernel takes them."""
    return (
        hasattr(F, "grouped_mm")
        and rows.device.type == "cpu"
        and rows.ndim == 2
        and rows.dtype == torch.float32
        and 0 < len(rows) * weight.shape[1] <= _SMALL_RESULT
        and all(map(_is_aligned, (rows, weight)))
    )


def _is_aligned(array: Tensor) -> bool:
    """Return whether rows, of an array or of its transpose, are contiguous and aligned."""
    stored = array if array.is_contiguous() else array.mT
    # Torch calls a single row contiguous even if its stride is longer. The kernel reads the stride.
    row = stored.stride(-2) * stored.element_size()
    return (
        stored.is_contiguous()
        and stored.stride(-2) == stored.shape[-1]
        and row % _ALIGNMENT == 0
        and stored.data_ptr() % _ALIGNMENT == 0
    )


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


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    rows, weight, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        grouped_linear(grad, weight.mT, offsets) if needs[0] else None,
        grouped_outer(grad, rows, offsets) if needs[1] else None,
        None,
    )


def _outer_backward(ctx, grad):  # type: ignore[no-untyped-def]
    left, right, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        grouped_linear(right, grad, offsets) if needs[0] else None,
        grouped_linear(left, grad.mT, offsets) if needs[1] else None,
        None,
    )


def _save_indices(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _per_row_backward(ctx, grad):  # type: ignore[no-untyped-def]
    experts, offsets = ctx.saved_tensors
    if needs_native_operators():
        ones = grad.new_ones(len(grad), 1)
        return _native_outer(grad, ones, offsets)[..., 0], None, None
    return torch.ops.tnmoe.grouped_sum(grad, experts, offsets), None, None


def _grouped_sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
    experts, offsets = ctx.saved_tensors
    if needs_native_operators():
        return _entries(grad, experts), None, None
    return torch.ops.tnmoe.per_row(grad, experts, offsets), None, None


_per_row.register_autograd(_per_row_backward, setup_context=_save_indices)
_grouped_sum.register_autograd(_grouped_sum_backward, setup_context=_save_indices)
_grouped_linear.register_autograd(_linear_backward, setup_context=_save_inputs)
_grouped_outer.register_autograd(_outer_backward, setup_context=_save_inputs)
