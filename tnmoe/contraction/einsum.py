"""Contractions of tensor networks: opt_einsum's order, every step one product of matrices.

A step permutes and reshapes two arrays to matrices and multiplies these, which every array
library can do. Nothing is copied where the axes lie as needed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import opt_einsum

from tnmoe.backends import Array, Backend

Shapes = tuple[tuple[int, ...], ...]
Axes = tuple[int, ...]


def contract(xp: Backend, equation: str, *arrays: Array) -> Array:
    """Contract arrays in the order of fewest operations, found once per equation and shapes.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    equation : str
        As for ``numpy.einsum``. Every index belongs to two arrays, or to one and the result.
    *arrays : array
        One per term of the equation.

    Returns
    -------
    array
        The result, which need not be contiguous.
    """
    shapes = tuple(tuple(array.shape) for array in arrays)
    return _best_contraction(equation, shapes)(xp, arrays)


@lru_cache(maxsize=4096)
def _best_contraction(equation: str, shapes: Shapes) -> Contraction:
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return Contraction(equation, shapes, path)


class Contraction:
    """A contraction of arrays of known shapes along a known path.

    Parameters
    ----------
    equation : str
        As for :func:`contract`.
    shapes : tuple of tuple of int
        Of the arrays.
    path : sequence of sequence of int
        Pairs of arrays to multiply, in opt_einsum's form: both leave the list of arrays, and
        their product is appended to it.
    """

    def __init__(self, equation: str, shapes: Shapes, path: Sequence[Sequence[int]]) -> None:
        inputs, result = equation.split("->")
        terms = inputs.split(",")
        sizes = {
            index: size
            for term, shape in zip(terms, shapes, strict=True)
            for index, size in zip(term, shape, strict=True)
        }
        self._steps: list[tuple[int, int, _Product]] = []
        for pair in path:
            if len(pair) == 2:  # the path of a single array has one step, which changes nothing
                first, second = sorted(pair)
                right, left = terms.pop(second), terms.pop(first)
                term, product = _product(left, right, sizes, None if terms else result)
                self._steps.append((first, second, product))
                terms.append(term)
        self._last_axes = _permutation(terms[0], result)

    def __call__(self, xp: Backend, arrays: Sequence[Array]) -> Array:
        """Contract arrays of the library ``xp``."""
        remaining = list(arrays)
        for first, second, product in self._steps:
            right, left = remaining.pop(second), remaining.pop(first)
            remaining.append(product(xp, left, right))
        (result,) = remaining
        return result if self._last_axes is None else xp.permute(result, self._last_axes)


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of two arrays over their common axes: how to make matrices of the arrays."""

    swapped: bool
    left_axes: Axes | None
    right_axes: Axes | None
    rows: int
    depth: int
    columns: int
    shape: tuple[int, ...]

    def __call__(self, xp: Backend, left: Array, right: Array) -> Array:
        if self.swapped:
            left, right = right, left
        if self.left_axes is not None:
            left = xp.permute(left, self.left_axes)
        if self.right_axes is not None:
            right = xp.permute(right, self.right_axes)
        product = left.reshape(self.rows, self.depth) @ right.reshape(self.depth, self.columns)
        return product.reshape(self.shape)


def _product(
    left: str, right: str, sizes: dict[str, int], result: str | None
) -> tuple[str, _Product]:
    """Return the indices of a product, and the product itself.

    ``result`` is given for the last product, which then begins with the result's first indices
    where it can.
    """
    swapped = result is not None and result.startswith(tuple(right))
    if swapped:
        left, right = right, left
    rows = "".join(index for index in left if index not in right)
    columns = "".join(index for index in right if index not in left)
    # Summed indices keep their order in the larger array, which is then less often copied.
    larger, smaller = (left, right) if _size(left, sizes) >= _size(right, sizes) else (right, left)
    depth = "".join(index for index in larger if index in smaller)
    product = _Product(
        swapped=swapped,
        left_axes=_permutation(left, rows + depth),
        right_axes=_permutation(right, depth + columns),
        rows=_size(rows, sizes),
        depth=_size(depth, sizes),
        columns=_size(columns, sizes),
        shape=tuple(sizes[index] for index in rows + columns),
    )
    return rows + columns, product


def _permutation(term: str, target: str) -> Axes | None:
    """Return the axes that bring indices into the order of ``target``; None if they are in it."""
    return None if term == target else tuple(map(term.index, target))


def _size(term: str, sizes: dict[str, int]) -> int:
    return prod(sizes[index] for index in term)
