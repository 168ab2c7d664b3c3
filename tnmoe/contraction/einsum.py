"""Contractions of tensor networks: the order from opt_einsum, every step one product of matrices.

A step permutes and reshapes two arrays to matrices, which copies nothing where their axes lie so
already, and multiplies them: what every array library can do.
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
        As ``numpy.einsum`` has it. Every index belongs to two arrays, or to one and the result.
    *arrays : array
        One per term of the equation.

    Returns
    -------
    array
        The result; it need not be contiguous.
    """
    shapes = tuple(tuple(array.shape) for array in arrays)
    return _best(equation, shapes)(xp, arrays)


@lru_cache(maxsize=4096)
def _best(equation: str, shapes: Shapes) -> Contraction:
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return Contraction(equation, shapes, path)


class Contraction:
    """A contraction of arrays of known shapes along a known path.

    Parameters
    ----------
    equation, shapes : str, tuple of tuple of int
        What :func:`contract` is called with.
    path : sequence of sequence of int
        Pairs of arrays to multiply, in opt_einsum's form: both leave the list of arrays, and
        their product is appended to it.
    """

    def __init__(self, equation: str, shapes: Shapes, path: Sequence[Sequence[int]]) -> None:
        given, result = equation.split("->")
        terms = given.split(",")
        sizes = {
            index: size
            for term, shape in zip(terms, shapes, strict=True)
            for index, size in zip(term, shape, strict=True)
        }
        self._steps: list[tuple[int, int, _Product]] = []
        for pair in path:
            if len(pair) == 2:  # a lone array has the path of one step that leaves it alone
                first, second = sorted(pair)
                right, left = terms.pop(second), terms.pop(first)
                term, product = _product(left, right, sizes, None if terms else result)
                self._steps.append((first, second, product))
                terms.append(term)
        self._last = _order(terms[0], result)

    def __call__(self, xp: Backend, arrays: Sequence[Array]) -> Array:
        """Contract arrays of the library ``xp``."""
        remaining = list(arrays)
        for first, second, product in self._steps:
            right, left = remaining.pop(second), remaining.pop(first)
            remaining.append(product(xp, left, right))
        return remaining[0] if self._last is None else xp.permute(remaining[0], self._last)


@dataclass(frozen=True, slots=True)
class _Product:
    """The product of two arrays over the axes they share: how to make matrices of them."""

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
    """The indices of a product and how to form it; the last product is to look like the result."""
    swapped = result is not None and result.startswith(tuple(right))
    if swapped:
        left, right = right, left
    rows = "".join(index for index in left if index not in right)
    columns = "".join(index for index in right if index not in left)
    # Summed indices come as they lie in the larger array, which is then less often copied.
    larger, other = (left, right) if _size(left, sizes) >= _size(right, sizes) else (right, left)
    depth = "".join(index for index in larger if index in other)
    product = _Product(
        swapped,
        _order(left, rows + depth),
        _order(right, depth + columns),
        _size(rows, sizes),
        _size(depth, sizes),
        _size(columns, sizes),
        tuple(sizes[index] for index in rows + columns),
    )
    return rows + columns, product


def _order(term: str, wanted: str) -> Axes | None:
    """The permutation that brings indices in another order; None where they are in it."""
    return None if term == wanted else tuple(map(term.index, wanted))


def _size(term: str, sizes: dict[str, int]) -> int:
    return prod(sizes[index] for index in term)
