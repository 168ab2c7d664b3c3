"""A matrix as a function of row and column: its calls, checked, counted and scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tnmoe.backends import Array, backend_named, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES
from tnmoe.chains.checks import KNOWN_DTYPES, check_dtype
from tnmoe.chains.cross import Indices
from tnmoe.chains.scaling import exponent_of, times_power
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape

# Entries per call of the function, at most.
_BATCH = 2**20
# The function's numbers are scaled unless the largest is within this many powers of two of 1.
_NEAR_ONE = 8

_NUMPY = backend_named("numpy")


class FunctionEntries:
    """The entries of a matrix, from a function.

    Parameters
    ----------
    function : callable
        Takes rows and columns, and returns an array of as many numbers.
    shape : MPOShape
        The function is not called in the padding, which is zero.
    most : int
        Number of entries that may be evaluated.

    Attributes
    ----------
    count : int
        Entries evaluated so far.
    like : array
        The first array that the function returned.
    exponent : int
        The numbers are divided by this power of two, which makes the first ones about 1 at most,
        so that they can be squared.
    """

    def __init__(
        self, function: Callable[[np.ndarray, np.ndarray], Array], shape: MPOShape, most: int
    ) -> None:
        self._function, self._shape, self._most = function, shape, most
        self.count = 0
        self.like: Array = None
        self.exponent = 0

    @property
    def left(self) -> int:
        """How many more entries may be evaluated."""
        return self._most - self.count

    @property
    def dtype_name(self) -> str:
        """Dtype of the function's numbers."""
        return get_backend(self.like).dtype_name(self.like)

    def require(self, evaluations: int, what: str) -> None:
        """Raise an InputError unless this number of further entries may be evaluated."""
        if evaluations > self.left:
            raise InputError(
                f"max_evaluations={self._most} is too few: {what} takes {evaluations}"
                + (f" after {self.count} before it" if self.count else "")
            )

    def __call__(self, indices: Indices) -> np.ndarray:
        """Return the matrix at indices, in double precision."""
        shape = self._shape
        inside = (indices.rows < shape.out_features) & (indices.columns < shape.in_features)
        wanted = indices if inside.all() else indices[inside]
        numbers = [
            self._call(wanted[start : start + _BATCH]) for start in range(0, len(wanted), _BATCH)
        ]
        if wanted is indices:
            return np.concatenate(numbers)
        values: np.ndarray = np.zeros(len(indices), self._wide_dtype())
        values[inside] = np.concatenate([values[:0], *numbers])
        return values

    def _call(self, wanted: Indices) -> np.ndarray:
        # Copies, since the function may write into what it is given.
        values = self._function(wanted.rows.copy(), wanted.columns.copy())
        self._check(values, len(wanted))
        numbers: np.ndarray = get_backend(values).to_numpy(values).astype(self._wide_dtype())
        finite = np.isfinite(numbers)
        if not finite.all():
            first = int(finite.argmin())
            raise InputError(
                f"function must return finite numbers, got {numbers[first]} at row "
                f"{wanted.rows[first]}, column {wanted.columns[first]}"
            )
        if not self.count:
            self.exponent = exponent_of(_NUMPY, numbers, _NEAR_ONE, "the function returned")
        self.count += len(wanted)
        return times_power(numbers, -self.exponent)

    def _wide_dtype(self) -> type:
        return np.complex128 if self.dtype_name in COMPLEX_DTYPES else np.float64

    def _check(self, values: Any, count: int) -> None:
        """Raise an InputError unless the values are one number per entry, as in earlier calls."""
        try:
            xp = get_backend(values)
        except TypeError as error:
            raise InputError(f"function must return an array: {error}") from error
        if tuple(values.shape) != (count,):
            raise InputError(
                "function must return one number per entry, an array of shape "
                f"{(count,)}, got shape {tuple(values.shape)}"
            )
        name = check_dtype(xp, values, f"function must return {KNOWN_DTYPES}")
        if self.like is None:
            self.like = values
        elif (get_backend(self.like), self.dtype_name) != (xp, name):
            raise InputError(
                "function must return arrays of one library and dtype, got "
                f"{get_backend(self.like).name}'s {self.dtype_name} first, then {xp.name}'s {name}"
            )
