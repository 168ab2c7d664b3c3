"""Rows times matrices that are built, used and dropped: the route ``rebuilt``.

On a CPU only one block of rows of one expert's matrix exists at a time, and only the matrices of
experts that have rows are built. The forward pass keeps the cores alone, and the backward pass
builds the matrices again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tnmoe.nn.compute.cores import ExpertCores, Legs
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer
from tnmoe.nn.compute.half_precision import add_product, sum_dtype
from tnmoe.nn.compute.matrices import MatrixBuilder, environments, padded_matrices
from tnmoe.nn.compute.slots import Groups, blocks_of
from tnmoe.nn.transforms import needs_native_operators


def rebuilt_linear(rows: Tensor, cores: ExpertCores, groups: Groups) -> Tensor:
    """Multiply padded rows by their experts' matrices, which are built on the way.

    Where experts own their central cores, all matrices are built at once. Parameters and result
    are those of :func:`tnmoe.nn.compute.routes.expert_linear`.
    """
    cores = cores.to(rows.dtype).mask_unused(groups)
    if cores.owns_center:
        return grouped_linear(rows, padded_matrices(cores), groups.offsets)
    left, right = environments(cores)
    if needs_native_operators():
        matrices = _matrices(_left_products(cores.center, left, cores.legs), right, cores.legs)
        return grouped_linear(rows, matrices, groups.offsets)
    return torch.ops.tnmoe.rebuilt_linear(
        rows, cores.center, left, right, groups.offsets, cores.legs.numbers
    )


@torch.library.custom_op("tnmoe::rebuilt_linear", mutates_args=())
def _rebuilt_linear(
    rows: Tensor, center: Tensor, left: Tensor, right: Tensor, offsets: Tensor, legs: Sequence[int]
) -> Tensor:
    builder = MatrixBuilder(center, Legs.from_numbers(legs))
    result = rows.new_empty(rows.shape[0], builder.legs.out_features)
    for experts, block in _batches_of_experts(offsets):
        products, rights = builder.left_products(left[experts]), right[experts]
        for part, outs in builder.row_blocks():
            weight = builder.matrix_rows(builder.left_factor(products[:, part]), rights)
            if len(weight) == 1:
                torch.mm(rows[block], weight[0].T, out=result[block, outs])
            else:
                result = grouped_linear(rows, weight, offsets)
    return result


@torch.library.custom_op("tnmoe::rebuilt_linear_backward", mutates_args=())
def _rebuilt_linear_backward(
    grad: Tensor,
    rows: Tensor,
    factors: Sequence[Tensor],
    offsets: Tensor,
    legs: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the rows and of the factors: centre, left and right.

    ``needs`` says whether rows, and whether factors, have gradients; zeros stand for the rest.
    """
    center, left, right = factors
    needs_rows, needs_factors = needs
    builder = MatrixBuilder(center, Legs.from_numbers(legs))
    grad_rows, grad_center, grad_right = (
        _zeros_like(tensor, sum_dtype(rows.dtype)) for tensor in (rows, center, right)
    )
    # No sum: every expert's part is written once.
    grad_left = _zeros_like(left, left.dtype)
    for experts, block in _batches_of_experts(offsets):
        products, rights = builder.left_products(left[experts]), right[experts]
        grad_products = builder.array("gradient of left products", *products.shape)
        for part, outs in builder.row_blocks():
            factor = builder.left_factor(products[:, part])
            if needs_rows:
                weight = builder.matrix_rows(factor, rights)
                grad_rows = _add_grad_of_rows(grad_rows, block, grad[:, outs], weight, offsets)
            if needs_factors:
                weight = builder.empty_rows(factor)
                weight = _grad_of_weight(grad[:, outs], rows, block, weight, offsets)
                grad_part = grad_products[:, part]
                builder.matrix_rows_backward(weight, factor, rights, grad_part, grad_right[experts])
        if needs_factors:
            builder.left_products_backward(
                grad_products, left[experts], grad_left[experts], grad_center
            )
    grad_rows, grad_center, grad_right = (
        total.to(rows.dtype) for total in (grad_rows, grad_center, grad_right)
    )
    return grad_rows, grad_center, grad_left, grad_right


def _zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _add_grad_of_rows(
    total: Tensor, block: slice, grad: Tensor, weight: Tensor, offsets: Tensor
) -> Tensor:
    """Return ``total`` plus the part of one expert's block, or the gradient from all experts."""
    if len(weight) > 1:
        return grouped_linear(grad, weight.mT, offsets)
    add_product(total[block], grad[block], weight[0])
    return total


def _grad_of_weight(
    grad: Tensor, rows: Tensor, block: slice, out: Tensor, offsets: Tensor
) -> Tensor:
    """Return the gradient of a block of one expert's matrix, or of all experts' matrices."""
    if len(out) > 1:
        return grouped_outer(grad, rows, offsets)
    torch.mm(grad[block].T, rows[block], out=out[0])
    return out


def _batches_of_experts(offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield experts whose matrices are built together, and their rows."""
    if offsets.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for expert, block in blocks_of(offsets):
        yield slice(expert, expert + 1), block


@_rebuilt_linear.register_fake
def _(rows, center, left, right, offsets, legs):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], Legs.from_numbers(legs).out_features)


@_rebuilt_linear_backward.register_fake
def _(grad, rows, factors, offsets, legs, needs):  # type: ignore[no-untyped-def]
    return tuple(tensor.new_empty(tensor.shape) for tensor in (rows, *factors))


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.legs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad
    rows, *factors, offsets = ctx.saved_tensors
    # With create_graph=True the gradients have gradients themselves, to any order.
    native = needs_native_operators() or (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )
    backward: Any = _native_backward if native else torch.ops.tnmoe.rebuilt_linear_backward
    gradients = backward(
        grad.contiguous(), rows, factors, offsets, ctx.legs, [needs[0], any(needs[1:4])]
    )
    needed = (gradient if need else None for gradient, need in zip(gradients, needs, strict=False))
    return (*needed, None, None)


_rebuilt_linear.register_autograd(_backward, setup_context=_save_inputs)


# The same computation in torch's own operators, which have gradients themselves. Letters of the
# legs left of the centre, at it, and right of it: outputs a, o, c and inputs b, p, g. Bonds: d, f.


def _left_products(center: Tensor, left: Tensor, legs: Legs) -> Tensor:
    left = left.unflatten(1, (legs.out[0], legs.in_[0]))
    return torch.einsum("eabd,dopf->eabopf", left, center)


def _matrices(products: Tensor, right: Tensor, legs: Legs) -> Tensor:
    """Multiply left products by R: matrices (E, out, in)."""
    right = right.unflatten(2, (legs.out[2], legs.in_[2]))
    return torch.einsum("eabopf,efcg->eaocbpg", products, right).flatten(4, 6).flatten(1, 3)


def _native_backward(  # type: ignore[no-untyped-def]
    grad, rows, factors, offsets, numbers, needs
):
    """Compute the gradients of the backward operator."""
    (center, left, right), legs = factors, Legs.from_numbers(numbers)
    products = _left_products(center, left, legs)
    grad_rows = grad_center = grad_left = grad_right = None
    if needs[0]:
        grad_rows = grouped_linear(grad, _matrices(products, right, legs).mT, offsets)
    if needs[1]:
        grad_matrices = grouped_outer(grad, rows, offsets)
        grad_matrices = grad_matrices.unflatten(2, legs.in_).unflatten(1, legs.out)
        grad_right = torch.einsum("eabopf,eaocbpg->efcg", products, grad_matrices).flatten(2)
        right = right.unflatten(2, (legs.out[2], legs.in_[2]))
        grad_products = torch.einsum("eaocbpg,efcg->eabopf", grad_matrices, right)
        grad_left = torch.einsum("eabopf,dopf->eabd", grad_products, center).flatten(1, 2)
        left = left.unflatten(1, (legs.out[0], legs.in_[0]))
        grad_center = torch.einsum("eabd,eabopf->dopf", left, grad_products)
    return grad_rows, grad_center, grad_left, grad_right
