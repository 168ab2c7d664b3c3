"""A toy array library: the least that an array library can be, and closed to NumPy's functions.

A ``ToyArray`` keeps its numbers in NumPy, but is not a NumPy array. It cannot be written into, and
every NumPy function refuses it. It also lacks NumPy's habits that other libraries do not have:
index arrays, truth values, methods such as ``sum`` or ``T``, and NumPy's scalars as operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import numpy as np

Index = int | slice | None | EllipsisType


class ToyArray:
    """An array of a toy library.

    Parameters
    ----------
    numbers : numpy.ndarray
        The numbers. They are not copied.
    """

    __slots__ = ("numbers",)

    # With this attribute, NumPy's ufuncs and operators refuse the array.
    __array_ufunc__ = None

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = np.asarray(numbers)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        # Without this method, NumPy would copy the array entry by entry as a Python sequence.
        raise TypeError("a toy array was given to a function of NumPy")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def ndim(self) -> int:
        return self.numbers.ndim

    @property
    def dtype(self) -> str:
        return self.numbers.dtype.name

    @property
    def real(self) -> ToyArray:
        return ToyArray(self.numbers.real)

    @property
    def imag(self) -> ToyArray:
        return ToyArray(self.numbers.imag)

    def reshape(self, *sizes: Any) -> ToyArray:
        return ToyArray(self.numbers.reshape(*sizes))

    def clip(self, least: float) -> ToyArray:
        return ToyArray(self.numbers.clip(least))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> ToyArray:
        for part in index if isinstance(index, tuple) else (index,):
            if not (part is None or type(part) in (int, slice, EllipsisType)):
                raise TypeError(f"toy arrays have no index of type {type(part).__qualname__}")
        return ToyArray(self.numbers[index])

    def __float__(self) -> float:
        return float(self.numbers)

    def __complex__(self) -> complex:
        return complex(self.numbers)

    def __bool__(self) -> bool:
        raise TypeError("a toy array has no truth value")

    def __neg__(self) -> ToyArray:
        return ToyArray(-self.numbers)

    def __add__(self, other: Any) -> ToyArray:
        return self._with(other, operator.add)

    def __radd__(self, other: Any) -> ToyArray:
        return self._with(other, lambda mine, theirs: theirs + mine)

    def __sub__(self, other: Any) -> ToyArray:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> ToyArray:
        return self._with(other, operator.mul)

    def __rmul__(self, other: Any) -> ToyArray:
        return self._with(other, lambda mine, theirs: theirs * mine)

    def __truediv__(self, other: Any) -> ToyArray:
        return self._with(other, operator.truediv)

    def __rtruediv__(self, other: Any) -> ToyArray:
        return self._with(other, lambda mine, theirs: theirs / mine)

    def __pow__(self, other: Any) -> ToyArray:
        return self._with(other, operator.pow)

    def __matmul__(self, other: Any) -> ToyArray:
        return self._with(other, operator.matmul)

    def __eq__(self, other: Any) -> ToyArray:  # type: ignore[override]
        return self._with(other, operator.eq)

    __hash__ = None  # type: ignore[assignment]

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if isinstance(other, ToyArray):
            return ToyArray(operation(self.numbers, other.numbers))
        # The exact type counts: NumPy's float64 is also a float, and would widen the result.
        if type(other) in (int, float, complex):
            return ToyArray(operation(self.numbers, other))
        return NotImplemented

    def __repr__(self) -> str:
        return f"ToyArray(shape={self.shape}, dtype={self.dtype})"
