"""Experts' matrices from the cores they share: built, used and dropped, forwards and backwards.

With the auxiliary cores left of the centre contracted to ``left`` (E, out·in, D) and those right
of it to ``right`` (E, D', out·in), a matrix is built in two products: ``left`` times the central
core, which gives a *half*, and half times ``right``. On a CPU that is done for one expert after
the other, in arrays that are still in the caches from the one before; on an accelerator for all
at once, so that it is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnmoe.backends import backend_named
from tnmoe.contraction import left_environment, right_environment
from tnmoe.nn.grouped import blocks_of, grouped_linear, grouped_outer, multiply_block, outer_block

_TORCH = backend_named("torch")


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


@torch.no_grad()
def build(center: Tensor, left: Tensor, right: Tensor, legs: Legs) -> Tensor:
    """Matrices (E, out, in) of all experts, without a gradient.

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
    workshop = Workshop(center, legs)
    result = center.new_empty(len(left), legs.out_features, legs.in_features)
    step = 1 if center.device.type == "cpu" else len(left)
    for lefts, rights, out in zip(*(x.split(step) for x in (left, right, result)), strict=True):
        workshop.whole(workshop.half(lefts), rights, out)
    return result


class Workshop:
    """Builds matrices of one layer, and takes gradients apart, in arrays that it uses again.

    What a method returns is overwritten by its next call.
    """

    def __init__(self, center: Tensor, legs: Legs) -> None:
        self.center, self.legs = center.reshape(center.shape[0], -1), legs
        self.bond = center.shape[-1]
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, *shape: int) -> Tensor:
        """An array of that shape, the one of that name if there is one."""
        if name not in self._arrays or self._arrays[name].shape != shape:
            self._arrays[name] = self.center.new_empty(shape)
        return self._arrays[name]

    def half(self, left: Tensor) -> Tensor:
        """(e, out·in, D) → (e, out left · out centre · in left · in centre, D')."""
        experts, rows, bond = left.shape
        (out_left, out_center, _), (in_left, in_center, _) = self.legs.out, self.legs.in_
        product = self.array("half product", experts * rows, self.center.shape[1])
        torch.mm(left.reshape(experts * rows, bond), self.center, out=product)
        if in_left > 1 and out_center > 1:
            apart = (experts, out_left, in_left, out_center, in_center * self.bond)
            half = self.array("half", experts, out_left, out_center, *apart[2:3], apart[4])
            product = half.copy_(product.view(apart).transpose(2, 3))
        return product.view(experts, self.legs.half_rows, self.bond)

    def half_backward(self, grad: Tensor, left: Tensor, of_left: Tensor, of_center: Tensor) -> None:
        """Gradient of ``left``; that of the central core, summed over experts, is added."""
        experts, rows, bond = left.shape
        (out_left, out_center, _), (in_left, in_center, _) = self.legs.out, self.legs.in_
        if in_left > 1 and out_center > 1:
            apart = (experts, out_left, out_center, in_left, in_center * self.bond)
            product = self.array("half product", experts * rows, self.center.shape[1])
            target = product.view(experts, out_left, in_left, out_center, -1)
            target.copy_(grad.view(apart).transpose(2, 3))
            grad = product
        grad = grad.view(experts * rows, -1)
        of_center.view(bond, -1).addmm_(left.reshape(experts * rows, bond).T, grad)
        torch.mm(grad, self.center.T, out=of_left.view(experts * rows, bond))

    def whole(self, half: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Halves times right environments, (e, out, in)."""
        experts = len(half)
        if out is None:
            out = self.array("whole", experts, self.legs.out_features, self.legs.in_features)
        if self._in_order:
            torch.bmm(half, right, out=out.view(experts, len(half[0]), -1))
            return out
        product = self.array("whole product", experts, half.shape[1], right.shape[2])
        torch.bmm(half, right, out=product)
        self._blocks(out).copy_(self._apart(product))
        return out

    def whole_backward(self, grad: Tensor, half: Tensor, right: Tensor, of_right: Tensor) -> Tensor:
        """Gradient of halves from that of the matrices; that of ``right`` is written."""
        product = grad.view(len(grad), half.shape[1], right.shape[2]) if self._in_order else None
        if product is None:
            product = self.array("whole product", len(grad), half.shape[1], right.shape[2])
            self._apart(product).copy_(self._blocks(grad))
        torch.bmm(half.mT, product, out=of_right)
        of_half = self.array("gradient of half", *half.shape)
        return torch.bmm(product, right.mT, out=of_half)

    @property
    def _in_order(self) -> bool:
        """Whether halves times right environments are the matrices as they lie."""
        return self.legs.out[2] == 1 or self.legs.in_[0] * self.legs.in_[1] == 1

    def _blocks(self, matrices: Tensor) -> Tensor:
        """(e, out, in) → (e, out left · out centre, in left · in centre, out right, in right)."""
        (out_left, out_center, out_right), (in_left, in_center, in_right) = (
            self.legs.out,
            self.legs.in_,
        )
        legs = (out_left * out_center, out_right, in_left * in_center, in_right)
        return matrices.view(-1, *legs).transpose(2, 3)

    def _apart(self, product: Tensor) -> Tensor:
        """Half rows · right legs, with the same axes."""
        (out_left, out_center, out_right), (in_left, in_center, in_right) = (
            self.legs.out,
            self.legs.in_,
        )
        legs = (out_left * out_center, in_left * in_center, out_right, in_right)
        return product.view(-1, *legs)


def shared_linear(
    rows: Tensor, center: Tensor, left: Tensor, right: Tensor, legs: Legs, offsets: Tensor
) -> Tensor:
    """``grouped_linear`` with matrices that are built on the way and never kept.

    On a CPU one expert's matrix exists at a time, and only those of experts that have rows are
    built. Only the cores are kept for the backward, which builds the matrices again.

    Parameters
    ----------
    rows : Tensor, shape (T, in)
        Sorted by expert.
    center, left, right, legs
        As for :func:`build`.
    offsets : Tensor of int32, shape (E,)
        Where the rows of every expert end.

    Returns
    -------
    Tensor, shape (T, out)
    """
    return torch.ops.tnmoe.shared_linear(rows, center, left, right, offsets, [*legs.out, *legs.in_])


@torch.library.custom_op("tnmoe::shared_linear", mutates_args=())
def _shared_linear(
    rows: Tensor,
    center: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    legs: Sequence[int],
) -> Tensor:
    workshop = _workshop(center, legs)
    result = rows.new_empty(rows.shape[0], workshop.legs.out_features)
    for experts, block in _turns(offsets):
        weight = workshop.whole(workshop.half(left[experts]), right[experts])
        if len(weight) == 1:
            multiply_block(rows[block], weight[0], result[block])
        else:
            result = grouped_linear(rows, weight, offsets)
    return result


@torch.library.custom_op("tnmoe::shared_linear_backward", mutates_args=())
def _shared_linear_backward(
    grad: Tensor,
    rows: Tensor,
    center: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    legs: Sequence[int],
    wants_rows: bool,
    wants_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    workshop = _workshop(center, legs)
    of_rows = torch.empty_like(rows)
    of_center, of_left, of_right = (
        torch.zeros_like(core, memory_format=torch.contiguous_format)
        for core in (center, left, right)
    )
    for experts, block in _turns(offsets):
        half, rights = workshop.half(left[experts]), right[experts]
        weight = workshop.array("whole", len(rights), grad.shape[1], rows.shape[1])
        if wants_rows:
            workshop.whole(half, rights)
            if len(weight) == 1:
                multiply_block(grad[block], weight[0].T, of_rows[block])
            else:
                of_rows = grouped_linear(grad, weight.mT, offsets)
        if wants_cores:
            if len(weight) == 1:
                outer_block(grad[block], rows[block], weight[0])
            else:
                weight = grouped_outer(grad, rows, offsets)
            of_half = workshop.whole_backward(weight, half, rights, of_right[experts])
            workshop.half_backward(of_half, left[experts], of_left[experts], of_center)
    return of_rows, of_center, of_left, of_right


def _workshop(center: Tensor, legs: Sequence[int]) -> Workshop:
    out, in_ = tuple(legs[:3]), tuple(legs[3:])
    return Workshop(center, Legs(out, in_))  # type: ignore[arg-type]


def _turns(offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Experts and their rows, as they are dealt with together."""
    if offsets.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for expert, block in blocks_of(offsets):
        yield slice(expert, expert + 1), block


@_shared_linear.register_fake
def _(rows, center, left, right, offsets, legs):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], legs[0] * legs[1] * legs[2])


@_shared_linear_backward.register_fake
def _(grad, rows, center, left, right, offsets, legs, wants_rows, wants_cores):  # type: ignore[no-untyped-def]
    return tuple(each.new_empty(each.shape) for each in (rows, center, left, right))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.legs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    wanted = ctx.needs_input_grad
    gradients = torch.ops.tnmoe.shared_linear_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.legs, wanted[0], any(wanted[1:4])
    )
    return (
        *(each if want else None for each, want in zip(gradients, wanted, strict=False)),
        None,
        None,
    )


_shared_linear.register_autograd(_backward, setup_context=_keep)
