"""Rows grouped by expert, and the product of every group with its own expert's matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
        Number of slots.
    order : Tensor of int64, shape (rows,)
        Slot at every row.
    inverse : Tensor of int64, shape (rows,)
        Row of every slot.
    """

    experts: Tensor
    offsets: Tensor
    rows: int
    order: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, expert_of_slot: Tensor, num_experts: int) -> Groups:
        """Sort slots (rows,) by their experts."""
        rows = expert_of_slot.shape[0]
        order = expert_of_slot.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(rows, device=order.device)
        experts = expert_of_slot[order]
        # Unlike bincount, a search in the sorted list is deterministic and waits for nothing.
        every = torch.arange(num_experts, device=order.device)
        ends = torch.searchsorted(experts, every, right=True)
        return cls(experts, ends.to(torch.int32), rows, order, inverse)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, start, stop) of every expert that has rows. Waits for an accelerator."""
        ends = [0, *self.offsets.tolist()]
        return [
            (expert, start, stop)
            for expert, (start, stop) in enumerate(pairwise(ends))
            if stop > start
        ]


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``torch.nn.functional.linear`` of each block of rows with its own matrix.

    Parameters
    ----------
    rows : Tensor, shape (T, in)
        Sorted by expert.
    weight : Tensor, shape (E, out, in)
        One matrix per expert, in the dtype of ``rows``.
    offsets : Tensor of int32, shape (E,)
        Where the block of every expert ends.

    Returns
    -------
    Tensor, shape (T, out)

    Notes
    -----
    One operator to ``torch.compile``, which need not know how many rows each expert has.
    """
    return torch.ops.tnmoe.grouped_linear(rows, weight, offsets)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """leftᵀ · right of every block of rows: (T, out), (T, in) → (E, out, in)."""
    return torch.ops.tnmoe.grouped_outer(left, right, offsets)


@torch.library.custom_op("tnmoe::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernel(rows, weight):
        return F.grouped_mm(rows, weight.mT, offs=offsets)
    result = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, (start, stop) in enumerate(_blocks(offsets)):
        if stop > start:
            torch.mm(rows[start:stop], weight[expert].T, out=result[start:stop])
    return result


@torch.library.custom_op("tnmoe::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernel(left, right):
        return F.grouped_mm(left.T, right, offs=offsets)
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, (start, stop) in enumerate(_blocks(offsets)):
        if stop > start:
            torch.mm(left[start:stop].T, right[start:stop], out=result[expert])
    return result


def _has_kernel(*arrays: Tensor) -> bool:
    """Whether torch's grouped kernel takes these: it wants rows of whole 16 bytes."""
    if not hasattr(F, "grouped_mm") or not arrays[0].is_cuda:
        return False
    return arrays[0].dtype in (torch.bfloat16, torch.float16) and all(
        array.shape[-1] * array.element_size() % 16 == 0 and array.is_contiguous()
        for array in arrays
    )


def _blocks(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


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


_grouped_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
_grouped_outer.register_autograd(_outer_backward, setup_context=_keep_outer)
