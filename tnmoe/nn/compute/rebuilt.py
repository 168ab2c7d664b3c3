"""Experts' matrices from the cores they share: built, used and dropped, forwards and backwards.

With the auxiliary cores left of the centre contracted to ``left`` (E, out·in, D) and those right
of it to ``right`` (E, D', out·in), a matrix is built in two products: ``left`` times the central
core, which gives a *half*, and half times ``right``. On a CPU that is done for one expert after
the other, and from the half on for some rows of its matrix after the other: what is built is
used while it is still in a cache. On an accelerator it is done for all at once, so that it is
not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tnmoe.backends import backend_named
from tnmoe.contraction.build import left_environment, right_environment
from tnmoe.nn.compute.grouped import blocks_of, grouped_linear, grouped_outer
from tnmoe.nn.compute.half_precision import add_product, sum_dtype
from tnmoe.nn.transforms import needs_native_operators

_TORCH = backend_named("torch")
_CONTIGUOUS = torch.contiguous_format


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


def experts_of(center: Tensor, aux: Sequence[Tensor]) -> int:
    """How many experts cores are for; shared auxiliary ones are stacks of one."""
    return max(len(core) for core in ([*aux, center] if center.ndim == 5 else aux))


def common_dtype(cores: Iterable[Tensor]) -> torch.dtype:
    """The dtype to multiply cores of several dtypes in: frozen and trained ones may differ."""
    return reduce(torch.promote_types, (core.dtype for core in cores))


def environments(
    left: Sequence[Tensor], right: Sequence[Tensor], experts: int
) -> tuple[Tensor, Tensor]:
    """Products of the stacked cores on either side of the centre.

    Parameters
    ----------
    left, right : sequence of Tensor, shapes (E, D, out, in, D') or (1, D, out, in, D')
        Every expert's own cores, or shared ones.
    experts : int
        Number of experts E.

    Returns
    -------
    Tensor, Tensor
        Shapes (E, out·in, D) and (E, D', out·in), outputs before inputs; (E, 1, 1) for a side
        without cores.
    """
    of_left = left_environment(_TORCH, _aligned(left))[0]
    of_right = right_environment(_TORCH, _aligned(right))[0]
    one = (*left, *right)[0].new_ones(1, 1, 1)
    # Of one alone where a side is shared as a whole.
    return tuple(
        (one if side is None else side).expand(experts, -1, -1) for side in (of_left, of_right)
    )  # type: ignore[return-value]


def _aligned(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Stacks of cores, all as long as the longest."""
    longest = max([1, *map(len, stacks)])
    return [stack.expand(longest, -1, -1, -1, -1) for stack in stacks]


@torch.no_grad()
def build(center: Tensor, left: Tensor, right: Tensor, legs: Legs) -> Tensor:
    """Matrices (E, out, in) of all experts, without a gradient.

    Parameters
    ----------
    center : Tensor, shape (D, out, in, D') or (E, D, out, in, D')
        Central core, shared or every expert's own.
    left : Tensor, shape (E, out·in, D)
        Environments left of it.
    right : Tensor, shape (E, D', out·in)
        Environments right of it.
    legs : Legs
        How their axes split.
    """
    if center.ndim == 5:
        owned = zip(center, left.split(1), right.split(1), strict=True)
        return torch.cat([build(*cores, legs) for cores in owned])
    builder = MatrixBuilder(center, legs)
    result = center.new_empty(len(left), legs.out_features, legs.in_features)
    step = 1 if center.device.type == "cpu" else len(left)
    for lefts, rights, out in zip(*(x.split(step) for x in (left, right, result)), strict=True):
        halves = builder.halves(lefts)
        for part, rows in builder.pieces():
            builder.matrix(builder.piece(halves[:, part]), rights, out[:, rows])
    return result


class MatrixBuilder:
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

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Output legs left of the centre that are dealt with together, and the matrix's rows."""
        count, each = self.legs.out[0], self.legs.out[1] * self.legs.out[2]
        step = count
        if self.center.device.type == "cpu":
            step = ceil(count / ceil(count * each * self.legs.in_features / _PIECE))
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), slice(start * each, stop * each)

    def halves(self, left: Tensor) -> Tensor:
        """(e, out·in, D) → (e, out left, in left, out centre, in centre · D')."""
        experts, rows, bond = left.shape
        half = self.array("half", experts * rows, self.center.shape[1])
        torch.mm(left.reshape(experts * rows, bond), self.center, out=half)
        (out_left, out_center, _), in_left = self.legs.out, self.legs.in_[0]
        return half.view(experts, out_left, in_left, out_center, -1)

    def halves_backward(
        self, grad: Tensor, left: Tensor, of_left: Tensor, of_center: Tensor
    ) -> None:
        """Gradient of ``left``; that of the central core, summed over experts, is added."""
        experts, rows, bond = left.shape
        grad = grad.view(experts * rows, -1)
        add_product(of_center.view(bond, -1), left.reshape(experts * rows, bond).T, grad)
        torch.mm(grad, self.center.T, out=of_left.view(experts * rows, bond))

    def piece(self, halves: Tensor) -> Tensor:
        """Some left output legs' halves, outputs before inputs: (e, rows, D')."""
        experts, count, in_left, out_center, _ = halves.shape
        if in_left > 1 and out_center > 1:
            piece = self.array("piece", experts, count, out_center, in_left, halves.shape[4])
            halves = piece.copy_(halves.transpose(2, 3))
        return halves.view(experts, -1, self.bond)

    def matrix(self, piece: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """A piece times right environments: rows of the matrices, (e, rows, in)."""
        if out is None:
            out = self.empty_matrix(piece)
        if self._in_order:
            torch.bmm(piece, right, out=out.view(len(piece), piece.shape[1], -1))
            return out
        product = self.array("product", len(piece), piece.shape[1], right.shape[2])
        torch.bmm(piece, right, out=product)
        self._blocks(out).copy_(self._apart(product))
        return out

    def empty_matrix(self, piece: Tensor) -> Tensor:
        """An array for the rows of matrices that a piece gives."""
        in_left, in_center, _ = self.legs.in_
        rows = piece.shape[1] // (in_left * in_center) * self.legs.out[2]
        return self.array("matrix", len(piece), rows, self.legs.in_features)

    def matrix_backward(
        self, grad: Tensor, piece: Tensor, right: Tensor, of_halves: Tensor, of_right: Tensor
    ) -> None:
        """Gradient of the halves in a piece is written, that of ``right`` is added."""
        if self._in_order:
            product = grad.view(len(piece), piece.shape[1], -1)
        else:
            product = self.array("product", len(piece), piece.shape[1], right.shape[2])
            self._apart(product).copy_(self._blocks(grad))
        add_product(of_right, piece.mT, product)
        experts, count, in_left, out_center, run = of_halves.shape
        if in_left == 1 or out_center == 1:
            torch.bmm(product, right.mT, out=of_halves.view(piece.shape))
            return
        of_piece = torch.bmm(product, right.mT, out=self.array("gradient of piece", *piece.shape))
        of_halves.copy_(of_piece.view(experts, count, out_center, in_left, run).transpose(2, 3))

    @property
    def _in_order(self) -> bool:
        """Whether a piece times right environments is rows of the matrices as they lie."""
        return self.legs.out[2] == 1 or self.legs.in_[0] * self.legs.in_[1] == 1

    def _blocks(self, matrices: Tensor) -> Tensor:
        """(e, rows, in) → (e, out left · centre, in left · centre, out right, in right)."""
        in_left, in_center, in_right = self.legs.in_
        legs = (self.legs.out[2], in_left * in_center, in_right)
        return matrices.view(len(matrices), -1, *legs).transpose(2, 3)

    def _apart(self, product: Tensor) -> Tensor:
        """A piece times right environments, with the same axes."""
        in_left, in_center, in_right = self.legs.in_
        return product.view(len(product), -1, in_left * in_center, self.legs.out[2], in_right)


# Numbers in the rows of a matrix that are built and used together, so that they stay in a cache.
_PIECE = 1 << 19


def rebuilt_linear(
    rows: Tensor, center: Tensor, left: Tensor, right: Tensor, legs: Legs, offsets: Tensor
) -> Tensor:
    """``grouped_linear`` with matrices that are built on the way and never kept.

    On a CPU some rows of one expert's matrix exist at a time, and only matrices of experts that
    have rows are built. Only the cores are kept for the backward, which builds the matrices again.

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
    if needs_native_operators():
        matrices = _whole(_half(center, left, legs), right, legs)
        return grouped_linear(rows, matrices.flatten(4, 6).flatten(1, 3), offsets)
    return torch.ops.tnmoe.rebuilt_linear(
        rows, center, left, right, offsets, [*legs.out, *legs.in_]
    )


def _half(center: Tensor, left: Tensor, legs: Legs) -> Tensor:
    """Halves of all experts in torch's own operators.

    Axes (E, out left, in left, out centre, in centre, D').
    """
    return torch.einsum("eabd,dopf->eabopf", left.unflatten(1, _left(legs)), center)


def _whole(half: Tensor, right: Tensor, legs: Legs) -> Tensor:
    """Matrices, with axes (E, out left, centre, right, in left, centre, right)."""
    return torch.einsum("eabopf,efcg->eaocbpg", half, right.unflatten(2, _right(legs)))


def _left(legs: Legs) -> tuple[int, int]:
    return legs.out[0], legs.in_[0]


def _right(legs: Legs) -> tuple[int, int]:
    return legs.out[2], legs.in_[2]


@torch.library.custom_op("tnmoe::rebuilt_linear", mutates_args=())
def _rebuilt_linear(
    rows: Tensor,
    center: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    legs: Sequence[int],
) -> Tensor:
    builder = _builder(center, legs)
    result = rows.new_empty(rows.shape[0], builder.legs.out_features)
    for experts, block in _turns(offsets):
        halves, rights = builder.halves(left[experts]), right[experts]
        for part, outs in builder.pieces():
            weight = builder.matrix(builder.piece(halves[:, part]), rights)
            if len(weight) == 1:
                torch.mm(rows[block], weight[0].T, out=result[block, outs])
            else:
                result = grouped_linear(rows, weight, offsets)
    return result


@torch.library.custom_op("tnmoe::rebuilt_linear_backward", mutates_args=())
def _rebuilt_linear_backward(
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
    builder = _builder(center, legs)
    # That of the left environments is no sum.
    dtype, of_left = sum_dtype(rows.dtype), torch.zeros_like(left, memory_format=_CONTIGUOUS)
    of_rows, of_center, of_right = (
        torch.zeros_like(each, dtype=dtype, memory_format=_CONTIGUOUS)
        for each in (rows, center, right)
    )
    for experts, block in _turns(offsets):
        halves, rights = builder.halves(left[experts]), right[experts]
        of_halves = builder.array("gradient of halves", *halves.shape)
        for part, outs in builder.pieces():
            piece = builder.piece(halves[:, part])
            weight = builder.matrix(piece, rights) if wants_rows else builder.empty_matrix(piece)
            if len(weight) > 1:
                if wants_rows:
                    of_rows = grouped_linear(grad, weight.mT, offsets)
                if wants_cores:
                    weight = grouped_outer(grad, rows, offsets)
            else:
                if wants_rows:
                    add_product(of_rows[block], grad[block, outs], weight[0])
                if wants_cores:
                    torch.mm(grad[block, outs].T, rows[block], out=weight[0])
            if wants_cores:
                of_part = of_halves[:, part]
                builder.matrix_backward(weight, piece, rights, of_part, of_right[experts])
        if wants_cores:
            builder.halves_backward(of_halves, left[experts], of_left[experts], of_center)
    of_rows, of_center, of_right = (each.to(rows.dtype) for each in (of_rows, of_center, of_right))
    return of_rows, of_center, of_left, of_right


def _builder(center: Tensor, legs: Sequence[int]) -> MatrixBuilder:
    out, in_ = tuple(legs[:3]), tuple(legs[3:])
    return MatrixBuilder(center, Legs(out, in_))  # type: ignore[arg-type]


def _turns(offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Experts and their rows, as they are dealt with together."""
    if offsets.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for expert, block in blocks_of(offsets):
        yield slice(expert, expert + 1), block


@_rebuilt_linear.register_fake
def _(rows, center, left, right, offsets, legs):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], legs[0] * legs[1] * legs[2])


@_rebuilt_linear_backward.register_fake
def _(grad, rows, center, left, right, offsets, legs, wants_rows, wants_cores):  # type: ignore[no-untyped-def]
    return tuple(each.new_empty(each.shape) for each in (rows, center, left, right))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.legs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    wanted = ctx.needs_input_grad
    # With create_graph=True the gradients have gradients themselves, to any order.
    apart = needs_native_operators() or (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )
    backward: Any = _backward_apart if apart else torch.ops.tnmoe.rebuilt_linear_backward
    gradients = backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.legs, wanted[0], any(wanted[1:4])
    )
    return (
        *(each if want else None for each, want in zip(gradients, wanted, strict=False)),
        None,
        None,
    )


def _backward_apart(  # type: ignore[no-untyped-def]
    grad, rows, center, left, right, offsets, legs, wants_rows, wants_cores
):
    """What the backward operator computes, in operators that have gradients themselves."""
    legs = Legs(tuple(legs[:3]), tuple(legs[3:]))
    half = _half(center, left, legs)
    of_rows = of_center = of_left = of_right = None
    if wants_rows:
        matrices = _whole(half, right, legs).flatten(4, 6).flatten(1, 3)
        of_rows = grouped_linear(grad, matrices.mT, offsets)
    if wants_cores:
        of_matrices = grouped_outer(grad, rows, offsets)
        of_matrices = of_matrices.unflatten(2, legs.in_).unflatten(1, legs.out)
        of_right = torch.einsum("eabopf,eaocbpg->efcg", half, of_matrices).flatten(2)
        right = right.unflatten(2, _right(legs))
        of_half = torch.einsum("eaocbpg,efcg->eabopf", of_matrices, right)
        of_left = torch.einsum("eabopf,dopf->eabd", of_half, center).flatten(1, 2)
        of_center = torch.einsum("eabd,eabopf->dopf", left.unflatten(1, _left(legs)), of_half)
    return of_rows, of_center, of_left, of_right


_rebuilt_linear.register_autograd(_backward, setup_context=_keep)
