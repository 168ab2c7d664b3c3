"""The backend of the toy library: the only file that tnmoe needs to work with its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from tests.backend_toy_array import ToyArray
from tnmoe.backends import backend_named, register

# The toy keeps its numbers in NumPy. A real library calls its own operations instead.
_NUMPY = backend_named("numpy")


class ToyBackend:
    """The protocol of :mod:`tnmoe.backends.protocol` for toy arrays."""

    name = "toy"

    # Into the library and out of it.

    def dtype_name(self, array: ToyArray) -> str:
        return array.dtype

    def astype(self, array: ToyArray, dtype: str) -> ToyArray:
        return ToyArray(_NUMPY.astype(array.numbers, dtype))

    def to_numpy(self, array: ToyArray) -> np.ndarray:
        return array.numbers

    def from_numpy(self, array: np.ndarray, like: ToyArray | None = None) -> ToyArray:
        return ToyArray(_NUMPY.from_numpy(array, None if like is None else like.numbers))

    def on_device(self, like: ToyArray) -> AbstractContextManager[None]:
        return nullcontext()

    def full_precision(self, like: ToyArray) -> AbstractContextManager[None]:
        return _NUMPY.full_precision(like.numbers)

    def tracked(self, array: ToyArray) -> bool:
        return False

    def has_numbers(self, array: ToyArray) -> bool:
        return True

    # Numbers from arrays.

    def max_abs(self, array: ToyArray) -> float:
        return _NUMPY.max_abs(array.numbers)

    def norm(self, array: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.norm(array.numbers))

    # Axes.

    def conj(self, array: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.conj(array.numbers))

    def permute(self, array: ToyArray, axes: Sequence[int]) -> ToyArray:
        return ToyArray(_NUMPY.permute(array.numbers, axes))

    def transpose(self, matrix: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.transpose(matrix.numbers))

    def adjoint(self, matrix: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.adjoint(matrix.numbers))

    def trace(self, array: ToyArray, first: int, second: int) -> ToyArray:
        return ToyArray(_NUMPY.trace(array.numbers, first, second))

    def pad(self, matrix: ToyArray, rows: int, columns: int) -> ToyArray:
        return ToyArray(_NUMPY.pad(matrix.numbers, rows, columns))

    def stack(self, arrays: Sequence[ToyArray]) -> ToyArray:
        return ToyArray(_NUMPY.stack([array.numbers for array in arrays]))

    def concatenate(self, arrays: Sequence[ToyArray], axis: int) -> ToyArray:
        return ToyArray(_NUMPY.concatenate([array.numbers for array in arrays], axis))

    # New arrays.

    def zeros(self, shape: Sequence[int], like: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.zeros(shape, like.numbers))

    def eye(self, size: int, like: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.eye(size, like.numbers))

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.normal(shape, rng, like.numbers))

    # Decompositions.

    def qr(self, matrix: ToyArray) -> tuple[ToyArray, ToyArray]:
        q, r = _NUMPY.qr(matrix.numbers)
        return ToyArray(q), ToyArray(r)

    def left_svd(self, matrix: ToyArray) -> tuple[ToyArray, ToyArray]:
        u, s = _NUMPY.left_svd(matrix.numbers)
        return ToyArray(u), ToyArray(s)

    def eigh(self, matrix: ToyArray) -> tuple[ToyArray, ToyArray]:
        values, vectors = _NUMPY.eigh(matrix.numbers)
        return ToyArray(values), ToyArray(vectors)

    def eigvalsh(self, matrix: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.eigvalsh(matrix.numbers))

    def cholesky(self, matrix: ToyArray) -> tuple[ToyArray, ToyArray] | None:
        found = _NUMPY.cholesky(matrix.numbers)
        return None if found is None else (ToyArray(found[0]), ToyArray(found[1]))

    def triangular_factor(self, matrix: ToyArray) -> ToyArray:
        return ToyArray(_NUMPY.triangular_factor(matrix.numbers))


backend = ToyBackend()
register(backend, ToyArray)
