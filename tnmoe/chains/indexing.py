"""Entries, rows and columns of the matrix of a chain of cores, chosen as from a NumPy array.

The digits of a row number choose one output leg of every core, and those of a column number one
input leg. What is left of the cores is small, and its product is the row, the column or the entry
(Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), section 1). Numbers are Python's integers, because
a matrix may have more rows than 64 bits can count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.algebra import Cores
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.errors import InputIndexError, short_repr
from tnmoe.shapes import MPOShape

_ALL = slice(None)


@dataclass(frozen=True)
class _Choice:
    """The rows or columns that an index chooses.

    Attributes
    ----------
    numbers : sequence of int
        From 0 on. Those of a slice are a range.
    axes : tuple of int
        Lengths of the axes that stand for them in the result; none for a single number.
    """

    numbers: Sequence[int]
    axes: tuple[int, ...]

    @property
    def is_array(self) -> bool:
        """Whether numbers were listed, which NumPy pairs with those of the other axis."""
        return bool(self.axes) and not isinstance(self.numbers, range)


def take(xp: Backend, shape: MPOShape, cores: Cores, index: Any) -> Array:
    """Return ``matrix[index]``, as NumPy defines it.

    Parameters
    ----------
    xp : Backend
        Library of the cores.
    shape : MPOShape
        Legs and size of the matrix.
    cores : sequence of array
        In a dtype with linear algebra.
    index : object
        An index of rows, or a tuple of one of rows and one of columns. Each is an integer, a slice,
        integers, or a mask of one axis.

    Raises
    ------
    InputIndexError
        If an index is of another kind, or out of range.
    """
    indices = index if isinstance(index, tuple) else (index,)
    if len(indices) > 2:
        raise InputIndexError(
            f"an operator has rows and columns, and takes two indices at most: got {len(indices)}"
        )
    of_rows, of_columns = (*indices, _ALL, _ALL)[:2]
    rows = _choose(of_rows, "row", shape.out_features)
    columns = _choose(of_columns, "column", shape.in_features)
    if rows.is_array and columns.is_array:
        rows, columns = _pair(rows, columns)
        return _entries(xp, shape, cores, rows.numbers, columns.numbers).reshape(rows.axes)
    block = _block(xp, shape, cores, rows.numbers, columns.numbers)
    axes = rows.axes + columns.axes
    return block.reshape(axes) if axes else block[0, 0]


def _choose(index: Any, name: str, size: int) -> _Choice:
    """Return the rows or columns that an index chooses, checked."""
    if isinstance(index, slice):
        chosen = range(*index.indices(size))
        return _Choice(chosen, (len(chosen),))
    numbers = _as_array(index)
    if numbers.dtype == bool:
        if numbers.shape != (size,):
            raise InputIndexError(
                f"a mask of {name}s needs shape ({short_repr(size)},), got {numbers.shape}"
            )
        numbers = np.flatnonzero(numbers)
    listed = numbers.reshape(-1).tolist()
    if not all(type(number) is int for number in listed):
        raise InputIndexError(
            f"{name}s are chosen by an integer, a slice, integers or a mask, "
            f"got {short_repr(index)}"
        )
    for number in listed:
        if not -size <= number < size:
            raise InputIndexError(
                f"{name} {short_repr(number)} is out of range: "
                f"the operator has {short_repr(size)} {name}s"
            )
    return _Choice([number % size for number in listed], numbers.shape)


def _as_array(index: Any) -> np.ndarray:
    """Return integers or a mask, of Python or any library, as a NumPy array."""
    try:
        return get_backend(index).to_numpy(index)
    except TypeError:  # of no library
        pass
    if isinstance(index, list) and not index:
        return np.zeros(0, int)
    try:
        return np.asarray(index)
    except ValueError:  # rows of several lengths
        return np.asarray(None)


def _pair(rows: _Choice, columns: _Choice) -> tuple[_Choice, _Choice]:
    """Broadcast listed rows and columns against each other: each pair is one entry."""
    arrays = (np.array(each.numbers, object).reshape(each.axes) for each in (rows, columns))
    try:
        first, second = np.broadcast_arrays(*arrays)
    except ValueError:
        raise InputIndexError(
            f"listed rows and columns are the pairs of an entry each, and must broadcast: got "
            f"{rows.axes} rows and {columns.axes} columns. For a block, use np.ix_(rows, columns)"
        ) from None
    return _Choice(first.ravel().tolist(), first.shape), _Choice(second.ravel().tolist(), ())


def _entries(
    xp: Backend, shape: MPOShape, cores: Cores, rows: Sequence[int], columns: Sequence[int]
) -> Array:
    """Return the entries at pairs of a row and a column, shape (pairs,)."""
    if not rows:
        return xp.zeros((0,), cores[0])
    if _held(cores, len(rows), (True, True)) <= _held(cores, 1, (False, False)):
        return _chosen_product(xp, shape, cores, rows, columns).reshape(len(rows))
    matrix = to_padded_matrix(xp, cores)
    return xp.stack([matrix[row, column] for row, column in zip(rows, columns, strict=True)])


def _block(
    xp: Backend, shape: MPOShape, cores: Cores, rows: Sequence[int], columns: Sequence[int]
) -> Array:
    """Return ``matrix[rows][:, columns]``.

    Rows may be chosen from the cores or from a product of them, and so may columns. Of these four
    ways it takes the one that holds the fewest numbers.
    """
    counts = len(rows), len(columns)
    if 0 in counts:
        return xp.zeros(counts, cores[0])
    batches = {
        (True, True): counts[0] * counts[1],
        (True, False): counts[0],
        (False, True): counts[1],
        (False, False): 1,
    }
    way = min(batches, key=lambda way: _held(cores, batches[way], way))
    if way == (True, True):
        pairs = zip(*product(rows, columns), strict=True)
        return _chosen_product(xp, shape, cores, *pairs).reshape(counts)
    if way == (True, False):
        matrix = _chosen_product(xp, shape, cores, rows, None)[:, 0]
        return xp.transpose(rows_of(xp, xp.transpose(matrix), columns))
    if way == (False, True):
        matrix = _chosen_product(xp, shape, cores, None, columns)[:, :, 0]
        return rows_of(xp, xp.transpose(matrix), rows)
    matrix = rows_of(xp, to_padded_matrix(xp, cores), rows)
    return xp.transpose(rows_of(xp, xp.transpose(matrix), columns))


def _held(cores: Cores, batch: int, way: tuple[bool, bool]) -> int:
    """Count the numbers of the cores, and of their product, that a way multiplies.

    ``way`` says whether rows, and whether columns, are chosen from the cores; ``batch`` is the
    number of products.
    """
    of_rows, of_columns = way
    outs = [1 if of_rows else core.shape[1] for core in cores]
    ins = [1 if of_columns else core.shape[2] for core in cores]
    bonds = [core.shape[0] * core.shape[3] for core in cores]
    return batch * (sum(map(prod, zip(bonds, outs, ins, strict=True))) + prod(outs) * prod(ins))


def _chosen_product(
    xp: Backend,
    shape: MPOShape,
    cores: Cores,
    rows: Sequence[int] | None,
    columns: Sequence[int] | None,
) -> Array:
    """Multiply what rows or columns, or pairs of both, choose of the cores: (batch, out, in)."""
    batch = len(columns or ()) if rows is None else len(rows)
    outs, ins = _digits(rows, shape.out_dims, batch), _digits(columns, shape.in_dims, batch)
    chosen = [
        xp.stack([core[:, out, in_] for out, in_ in zip(*legs, strict=True)])
        for core, *legs in zip(cores, outs, ins, strict=True)
    ]
    # The products of a batch are those of experts that own all of their cores.
    return to_padded_matrix(xp, chosen)


def _digits(numbers: Sequence[int] | None, legs: Sequence[int], batch: int) -> list[list[slice]]:
    """Return the part of every leg, site by site, that each number chooses; all of it for None."""
    if numbers is None:
        return [[_ALL] * batch] * len(legs)
    digits = []
    for leg in reversed(legs):
        digits.append([slice(number % leg, number % leg + 1) for number in numbers])
        numbers = [number // leg for number in numbers]
    return digits[::-1]


def rows_of(xp: Backend, matrix: Array, rows: Sequence[int]) -> Array:
    """Return rows of a matrix that exists."""
    if isinstance(rows, range) and rows.step > 0:  # torch has no other steps
        return matrix[rows.start : rows.stop : rows.step]
    return xp.stack([matrix[row] for row in rows])
