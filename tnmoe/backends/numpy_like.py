"""The operations that libraries with NumPy's functions spell alike: the base of their backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from tnmoe.backends.protocol import Array


class NumpyLike(ABC):
    """Most of the protocol, for a library whose functions have NumPy's names and arguments.

    The backend of such a library derives from this class and adds what the library does in its own
    way: ``to_numpy``, ``from_numpy``, ``full_precision`` and ``cholesky``. A library whose arrays
    cannot be written into replaces ``pad``.
    """

    name: str
    # The library's module, such as numpy.
    xp: Any

    def __repr__(self) -> str:
        return f"<backend of {self.name}>"

    def dtype_name(self, array: Array) -> str:
        return _name_of(array.dtype)

    def astype(self, array: Array, dtype: str) -> Array:
        if dtype == "bfloat16":  # np.dtype knows it only after another library registered it
            raise TypeError(f"the {self.name} backend has no bfloat16")
        return array.astype(dtype, copy=False)

    @abstractmethod
    def from_numpy(self, array: np.ndarray, like: Array | None = None) -> Array: ...

    def on_device(self, like: Array) -> AbstractContextManager[Any]:
        return nullcontext()

    def tracked(self, array: Array) -> bool:
        return False

    def has_numbers(self, array: Array) -> bool:
        return True

    def max_abs(self, array: Array) -> float:
        if _is_complex(array):
            return float(np.maximum(self.max_abs(array.real), self.max_abs(array.imag)))
        # Two passes without a copy; both give NaN if the array holds one.
        return float(max(array.max(), -array.min())) if array.size else 0.0

    def norm(self, array: Array) -> Array:
        scale = self.max_abs(array) or 1.0
        wide = array.astype("complex128" if _is_complex(array) else "float64")
        norm = self.xp.linalg.norm(wide.ravel() / scale) * scale
        return norm.astype(array.real.dtype)

    def conj(self, array: Array) -> Array:
        return array.conj() if _is_complex(array) else array

    def permute(self, array: Array, axes: Sequence[int]) -> Array:
        return array.transpose(axes)

    def transpose(self, matrix: Array) -> Array:
        return matrix.swapaxes(-1, -2)

    def adjoint(self, matrix: Array) -> Array:
        return self.conj(matrix).swapaxes(-1, -2)

    def trace(self, array: Array, first: int, second: int) -> Array:
        return array.trace(axis1=first, axis2=second)

    def pad(self, matrix: Array, rows: int, columns: int) -> Array:
        padded = self.zeros((*matrix.shape[:-2], rows, columns), matrix)
        padded[..., : matrix.shape[-2], : matrix.shape[-1]] = matrix
        return padded

    def stack(self, arrays: Sequence[Array]) -> Array:
        return self.xp.stack(arrays)

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        return self.xp.concatenate(arrays, axis)

    def zeros(self, shape: Sequence[int], like: Array) -> Array:
        return self.xp.zeros(tuple(shape), like.dtype)

    def eye(self, size: int, like: Array) -> Array:
        return self.xp.eye(size, dtype=like.dtype)

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: Array) -> Array:
        # NumPy draws, so that a seed gives the same numbers in every library and on every device.
        numbers = rng.standard_normal(shape)
        if _is_complex(like):
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return self.from_numpy(numbers, like)

    def qr(self, matrix: Array) -> tuple[Array, Array]:
        return self.xp.linalg.qr(matrix)

    def left_svd(self, matrix: Array) -> tuple[Array, Array]:
        return self.xp.linalg.svd(matrix, full_matrices=False)[:2]

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        values, vectors = self.xp.linalg.eigh(matrix)
        return values[..., ::-1], vectors[..., ::-1]

    def eigvalsh(self, matrix: Array) -> Array:
        return self.xp.linalg.eigvalsh(matrix)[..., ::-1]

    def triangular_factor(self, matrix: Array) -> Array:
        return self.adjoint(self.xp.linalg.qr(self.adjoint(matrix), mode="r"))


def _is_complex(array: Array) -> bool:
    return array.dtype.kind == "c"


@cache
def _name_of(dtype: np.dtype) -> str:
    """Return the name of a dtype, which NumPy composes anew at every call."""
    return dtype.name
