"""Experts' matrices from the cores they share: built, used and dropped, forwards and backwards.

With the auxiliary cores left of the centre contracted to ``left`` (E, out·in, D) and those right
of it to ``right`` (E, D', out·in), a matrix is built in two products: ``left`` times the central
core for all experts at once, which gives a *half* of every expert, and half times ``right``. The
big arrays are not permuted as a whole: rows of a half are put in order where they are long, and
the matrix is written in pieces that fit a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnmoe.backends import backend_named
from tnmoe.contraction import left_environment, right_environment
from tnmoe.nn.grouped import Groups, grouped_linear, grouped_outer

_TORCH = backend_named("torch")

# Numbers in a piece of a matrix that is still hot in a core's cache when it is put in order.
_PIECE = 1 << 17


@dataclass(frozen=True)
class Legs:
    """Output and input legs left of the centre, of the centre, and right of it."""

    out: tuple[int, int, int]
    in_: tuple[int, int, int]

    @property
    def out_features(self) -> int:
        return self.out[0] * self.out[1] * self.out[2]

    @property
    def in_features(self) -> int:
        return self.in_[0] * self.in_[1] * self.in_[2]

    @property
    def half_rows(self) -> int:
        """Rows of a half: (out left, out centre, in left, in centre)."""
        return self.out[0] * self.out[1] * self.in_[0] * self.in_[1]


def environments(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Products of the stacked cores (E, D, out, in, D') on either side of the centre.

    Returns
    -------
    Tensor, Tensor
        Shapes (E, out·in, D) and (E, D', out·in), outputs before inputs; (E, 1, 1) for a side
        without cores.
    """
    some = (*left, *right)[0]
    one = some.new_ones(len(some), 1, 1)
    of_left, of_right = left_environment(_TORCH, left)[0], right_environment(_TORCH, right)[0]
    return one if of_left is None else of_left, one if of_right is None else of_right


def build(center: Tensor, left: Tensor, right: Tensor, legs: Legs) -> Tensor:
    """Matrices (E, out, in) of all experts.

    Parameters
    ----------
    center : Tensor, shape (D, out, in, D')
        Central core.
    left : Tensor, shape (E, out·in, D)
        Environments left of it.
    right : Tensor, shape (E, D', out·in)
        Environments right of it.
    legs : Legs
        How their axes split.
    """
    return _whole(_half(center, left, legs), right, legs)


def _half(center: Tensor, left: Tensor, legs: Legs) -> Tensor:
    """Environments times the central core: (E, out left · out centre · in left · in centre, D')."""
    experts, rows, bond = left.shape
    product = left.reshape(experts * rows, bond) @ center.reshape(bond, -1)
    (out_left, out_center, _), (in_left, _, _) = legs.out, legs.in_
    product = product.view(experts, out_left, in_left, out_center, -1)
    return product.transpose(2, 3).reshape(experts, legs.half_rows, center.shape[-1])


def _half_backward(
    grad: Tensor, center: Tensor, left: Tensor, legs: Legs, of_center: Tensor
) -> Tensor:
    """Gradient of ``left``; that of the central core, one product for all experts, is added."""
    experts, rows, bond = left.shape
    (out_left, out_center, _), (in_left, _, _) = legs.out, legs.in_
    grad = grad.view(experts, out_left, out_center, in_left, -1).transpose(2, 3)
    grad = grad.reshape(experts * rows, -1)
    of_center.view(bond, -1).addmm_(left.reshape(experts * rows, bond).T, grad)
    return (grad @ center.reshape(bond, -1).T).view_as(left)


def _whole(half: Tensor, right: Tensor, legs: Legs, out: Tensor | None = None) -> Tensor:
    """Halves times right environments, (E, out, in)."""
    if out is None:
        out = half.new_empty(half.shape[0], legs.out_features, legs.in_features)
    blocks, halves = _in_blocks(out, legs), _rows_apart(half, legs)
    for piece in _pieces(blocks):
        product = halves[:, piece].flatten(1, 2) @ right
        # (E, rows, in left · in centre, out right, in right), as `blocks` has it, but for one swap
        target = blocks[:, piece]
        target.copy_(product.view_as(target.transpose(2, 3)).transpose(2, 3))
    return out


def _whole_backward(grad: Tensor, half: Tensor, right: Tensor, legs: Legs) -> tuple[Tensor, Tensor]:
    """Gradients of halves and right environments from those of the matrices."""
    of_half, of_right = torch.empty_like(half), torch.zeros_like(right)
    blocks, halves, of_halves = (
        _in_blocks(grad, legs),
        _rows_apart(half, legs),
        _rows_apart(of_half, legs),
    )
    for piece in _pieces(blocks):
        product = blocks[:, piece].transpose(2, 3).reshape(half.shape[0], -1, right.shape[-1])
        of_halves[:, piece] = (product @ right.mT).view_as(of_halves[:, piece])
        of_right.baddbmm_(halves[:, piece].flatten(1, 2).mT, product)
    return of_half, of_right


def _in_blocks(matrices: Tensor, legs: Legs) -> Tensor:
    """(E, out, in) → (E, out left · out centre, out right, in left · in centre, in right)."""
    (out_left, out_center, out_right), (in_left, in_center, in_right) = legs.out, legs.in_
    return matrices.view(-1, out_left * out_center, out_right, in_left * in_center, in_right)


def _rows_apart(half: Tensor, legs: Legs) -> Tensor:
    """(E, half rows, D') → (E, out left · out centre, in left · in centre, D')."""
    return half.view(half.shape[0], legs.out[0] * legs.out[1], -1, half.shape[-1])


def _pieces(blocks: Tensor) -> Iterator[slice]:
    """Ranges of the second axis: all on an accelerator, what fits a cache on a CPU."""
    rows = blocks.shape[1]
    step = rows if blocks.is_cuda else max(1, _PIECE * rows // max(1, blocks[0].numel()))
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _SharedLinear(torch.autograd.Function):
    """Rows times their experts' matrices, of which only the cores are kept for the backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        context,
        rows: Tensor,
        center: Tensor,
        left: Tensor,
        right: Tensor,
        legs: Legs,
        groups: Groups,
    ) -> Tensor:
        context.save_for_backward(rows, center, left, right)
        context.legs, context.groups = legs, groups
        result = rows.new_empty(rows.shape[0], legs.out_features)
        weight = None
        for experts, block in _turns(groups, rows):
            weight = _whole(_half(center, left[experts], legs), right[experts], legs, weight)
            _linear(rows[block], weight, groups, result[block])
        return result

    @staticmethod
    @once_differentiable
    def backward(context, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, center, left, right = context.saved_tensors
        legs, groups = context.legs, context.groups
        needs_rows, *needs_cores = context.needs_input_grad[:4]
        grad = grad.contiguous()
        of_rows = torch.empty_like(rows) if needs_rows else None
        of_center, of_left, of_right = map(torch.zeros_like, (center, left, right))
        weight = None
        for experts, block in _turns(groups, rows):
            half = _half(center, left[experts], legs)
            if of_rows is not None:
                weight = _whole(half, right[experts], legs, weight)
                _linear(grad[block], weight.mT, groups, of_rows[block])
            if any(needs_cores):
                of_weight = _outer(grad[block], rows[block], groups, weight)
                of_half, of_right[experts] = _whole_backward(of_weight, half, right[experts], legs)
                of_left[experts] = _half_backward(of_half, center, left[experts], legs, of_center)
        of_cores = (of_center, of_left, of_right)
        return of_rows, *(of_cores if any(needs_cores) else (None,) * 3), None, None


def shared_linear(
    rows: Tensor, center: Tensor, left: Tensor, right: Tensor, legs: Legs, groups: Groups
) -> Tensor:
    """``grouped_linear`` with matrices that are built on the way and never kept.

    On a CPU one expert's matrix exists at a time, and only those of experts that have rows are
    built; on an accelerator all are built at once, so that it is not waited for. The backward
    builds them again.

    Parameters
    ----------
    rows : Tensor, shape (T, in)
        Sorted by expert.
    center, left, right, legs
        As for :func:`build`.
    groups : Groups
        Which rows are whose.

    Returns
    -------
    Tensor, shape (T, out)
    """
    return _SharedLinear.apply(rows, center, left, right, legs, groups)


def _turns(groups: Groups, rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Experts and their rows, as they are dealt with together."""
    if rows.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for expert, start, stop in groups.spans:
        yield slice(expert, expert + 1), slice(start, stop)


def _linear(rows: Tensor, weight: Tensor, groups: Groups, out: Tensor) -> None:
    if len(weight) == 1:
        torch.mm(rows, weight[0].T, out=out)
    else:
        out.copy_(grouped_linear(rows, weight, groups.offsets))


def _outer(left: Tensor, right: Tensor, groups: Groups, out: Tensor | None) -> Tensor:
    """leftᵀ · right per expert; ``out`` may be overwritten."""
    if len(groups.offsets) > 1 and (out is None or len(out) > 1) and left.device.type != "cpu":
        return grouped_outer(left, right, groups.offsets)
    return torch.mm(left.T, right, out=None if out is None else out[0])[None]
