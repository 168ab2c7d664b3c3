"""Experts' matrices, built from their cores.

Let L (E, out·in, D) be the product of an expert's cores left of the centre, R (E, D', out·in) that
of the cores right of it, and C the central core. A matrix takes two products: the *left product*
L·C, then (L·C)·R. A CPU takes one expert after the other, and from the left product on one block
of the matrix's rows after the other: what is built is used while it is still in a cache. An
accelerator takes all experts at once and never synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from torch import Tensor

from tnmoe.backends import backend_named
from tnmoe.contraction.build import left_environment, right_environment
from tnmoe.nn.compute.cores import ExpertCores, Legs
from tnmoe.nn.compute.half_precision import add_product
from tnmoe.nn.transforms import without_autocast

_TORCH = backend_named("torch")

# Numbers in the rows of a matrix that are built and used together, to stay in a CPU's cache.
_BLOCK = 1 << 19


def padded_matrices(cores: ExpertCores) -> Tensor:
    """Return all matrices, (E, padded out, padded in), in torch's own operators.

    The cores must have one dtype. Gradients flow back to them.
    """
    left, right = environments(cores)
    *own, bond_left, _, _, bond_right = cores.center.shape
    product = cores.center.reshape(*own, -1, bond_right)
    if cores.left:  # a shared central core takes one product for all experts together
        rows = left if own else left.reshape(-1, bond_left)
        product = rows @ cores.center.reshape(*own, bond_left, -1)
        product = product.reshape(cores.num_experts, -1, bond_right)
    if cores.right:
        product = product @ right
    legs = cores.legs
    sizes = [size for leg in zip(legs.out, legs.in_, strict=True) for size in leg]
    outputs_first = product.reshape(-1, *sizes).permute(0, 1, 3, 5, 2, 4, 6)
    return outputs_first.reshape(-1, legs.out_features, legs.in_features)


def exact_matrices(cores: ExpertCores) -> Tensor:
    """Return all matrices, (E, out, in), with gradients, in the full precision of the cores."""
    cores = cores.to(cores.dtype)
    with _TORCH.full_precision(cores.center):
        matrices = padded_matrices(cores)
    return matrices[:, : cores.shape.out_features, : cores.shape.in_features]


@torch.no_grad()
def build_matrices(cores: ExpertCores) -> Tensor:
    """Return all matrices, (E, out, in), without gradients, in the precision of the cores."""
    with without_autocast(cores.center.device):
        cores = cores.to(cores.dtype)
        left, right = environments(cores)
        matrices = _build_padded(cores.center, left, right, cores.legs)
    return matrices[:, : cores.shape.out_features, : cores.shape.in_features]


def environments(cores: ExpertCores) -> tuple[Tensor, Tensor]:
    """Multiply the cores on either side of the centre.

    Parameters
    ----------
    cores : ExpertCores
        In one dtype.

    Returns
    -------
    Tensor, Tensor
        L and R of every expert, shapes (E, out·in, D) and (E, D', out·in), outputs before inputs;
        (E, 1, 1) for a side without cores. Views repeat a side that all experts share.
    """
    left = left_environment(_TORCH, _aligned(cores.left))[0]
    right = right_environment(_TORCH, _aligned(cores.right))[0]
    one = cores.center.new_ones(1, 1, 1)
    left, right = (one if side is None else side for side in (left, right))
    return left.expand(cores.num_experts, -1, -1), right.expand(cores.num_experts, -1, -1)


def _aligned(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Repeat shared cores, as views, up to the length of the longest stack."""
    longest = max([1, *map(len, stacks)])
    return [stack.expand(longest, -1, -1, -1, -1) for stack in stacks]


def _build_padded(center: Tensor, left: Tensor, right: Tensor, legs: Legs) -> Tensor:
    if center.ndim == 5:
        by_expert = zip(center, left.split(1), right.split(1), strict=True)
        return torch.cat([_build_padded(*factors, legs) for factors in by_expert])
    builder = MatrixBuilder(center, legs)
    result = center.new_empty(len(left), legs.out_features, legs.in_features)
    step = 1 if center.device.type == "cpu" else len(left)
    for lefts, rights, out in zip(*(x.split(step) for x in (left, right, result)), strict=True):
        products = builder.left_products(lefts)
        for part, rows in builder.row_blocks():
            builder.matrix_rows(builder.left_factor(products[:, part]), rights, out[:, rows])
    return result


class MatrixBuilder:
    """Builds the matrices of one layer, and computes their gradients, in reused arrays.

    The next call of a method overwrites what the last one returned. Axis e counts the experts
    that are built together.

    Parameters
    ----------
    center : Tensor, shape (D, out, in, D')
        The shared central core.
    legs : Legs
        Legs around it.
    """

    def __init__(self, center: Tensor, legs: Legs) -> None:
        self.center, self.legs = center.reshape(center.shape[0], -1), legs
        self.bond = center.shape[-1]
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, *shape: int) -> Tensor:
        """Return the array of a name, or a new one if that has another shape."""
        if name not in self._arrays or self._arrays[name].shape != shape:
            self._arrays[name] = self.center.new_empty(shape)
        return self._arrays[name]

    def row_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield blocks of the output legs left of the centre, and of the matrix's rows."""
        count, rows_per_leg = self.legs.out[0], self.legs.out[1] * self.legs.out[2]
        step = count
        if self.center.device.type == "cpu":
            numbers = count * rows_per_leg * self.legs.in_features
            step = ceil(count / ceil(numbers / _BLOCK))
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), slice(start * rows_per_leg, stop * rows_per_leg)

    def left_products(self, left: Tensor) -> Tensor:
        """Compute L·C: (e, out·in, D) → (e, out left, in left, out centre, in centre · D')."""
        experts, rows, bond = left.shape
        product = self.array("left products", experts * rows, self.center.shape[1])
        torch.mm(left.reshape(experts * rows, bond), self.center, out=product)
        (out_left, out_center, _), in_left = self.legs.out, self.legs.in_[0]
        return product.view(experts, out_left, in_left, out_center, -1)

    def left_products_backward(
        self, grad: Tensor, left: Tensor, grad_left: Tensor, grad_center: Tensor
    ) -> None:
        """Write the gradient of L; add that of C, summed over experts."""
        experts, rows, bond = left.shape
        grad = grad.view(experts * rows, -1)
        add_product(grad_center.view(bond, -1), left.reshape(experts * rows, bond).T, grad)
        torch.mm(grad, self.center.T, out=grad_left.view(experts * rows, bond))

    def left_factor(self, products: Tensor) -> Tensor:
        """Arrange left products of a block of rows as (e, rows, D'), outputs before inputs."""
        experts, count, in_left, out_center, _ = products.shape
        if in_left > 1 and out_center > 1:
            factor = self.array("factor", experts, count, out_center, in_left, products.shape[4])
            products = factor.copy_(products.transpose(2, 3))
        return products.view(experts, -1, self.bond)

    def matrix_rows(self, factor: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute the rows (e, rows, in) of a block: its left factor times R."""
        if out is None:
            out = self.empty_rows(factor)
        if self._lies_as_matrix:
            torch.bmm(factor, right, out=out.view(len(factor), factor.shape[1], -1))
            return out
        product = self.array("product", len(factor), factor.shape[1], right.shape[2])
        torch.bmm(factor, right, out=product)
        self._legs_of_rows(out).copy_(self._legs_of_product(product))
        return out

    def empty_rows(self, factor: Tensor) -> Tensor:
        """Return an array for the rows of the matrices that a left factor gives."""
        in_left, in_center, _ = self.legs.in_
        rows = factor.shape[1] // (in_left * in_center) * self.legs.out[2]
        return self.array("matrix", len(factor), rows, self.legs.in_features)

    def matrix_rows_backward(
        self, grad: Tensor, factor: Tensor, right: Tensor, grad_left: Tensor, grad_right: Tensor
    ) -> None:
        """Write the gradient of a block's left products; add that of R."""
        if self._lies_as_matrix:
            product = grad.view(len(factor), factor.shape[1], -1)
        else:
            product = self.array("product", len(factor), factor.shape[1], right.shape[2])
            self._legs_of_product(product).copy_(self._legs_of_rows(grad))
        add_product(grad_right, factor.mT, product)
        experts, count, in_left, out_center, run = grad_left.shape
        if in_left == 1 or out_center == 1:
            torch.bmm(product, right.mT, out=grad_left.view(factor.shape))
            return
        grad_factor = self.array("gradient of factor", *factor.shape)
        torch.bmm(product, right.mT, out=grad_factor)
        grad_factor = grad_factor.view(experts, count, out_center, in_left, run)
        grad_left.copy_(grad_factor.transpose(2, 3))

    @property
    def _lies_as_matrix(self) -> bool:
        """Whether a left factor times R lies in memory as the rows of the matrices do."""
        return self.legs.out[2] == 1 or self.legs.in_[0] * self.legs.in_[1] == 1

    # Both views have axes (e, out left · centre, in left · centre, out right, in right).

    def _legs_of_rows(self, rows: Tensor) -> Tensor:
        in_left, in_center, in_right = self.legs.in_
        legs = (self.legs.out[2], in_left * in_center, in_right)
        return rows.view(len(rows), -1, *legs).transpose(2, 3)

    def _legs_of_product(self, product: Tensor) -> Tensor:
        in_left, in_center, in_right = self.legs.in_
        return product.view(len(product), -1, in_left * in_center, self.legs.out[2], in_right)
