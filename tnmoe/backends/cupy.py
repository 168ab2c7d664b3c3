"""The backend of CuPy arrays, on any CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import cupy
import cupyx
import numpy as np
from cupy._core import _routines_linalg as products

from tnmoe.backends.numpy import backend as numpy_backend
from tnmoe.backends.numpy_like import NumpyLike
from tnmoe.backends.process_setting import ProcessSetting
from tnmoe.backends.protocol import Backend

B = TypeVar("B")

# What launches no kernel, or sees to the device itself.
_ON_ANY_DEVICE = {
    "dtype_name", "permute", "transpose", "tracked", "has_numbers", "on_device", "full_precision"
}  # fmt: skip


def _on_the_device_of_operands(backend: type[B]) -> type[B]:
    """Make the operations of a class compute on the device of their operands.

    CuPy computes on the current device, and does not look where the operands are.
    """
    for name, value in vars(Backend).items():
        if callable(value) and not name.startswith("_") and name not in _ON_ANY_DEVICE:
            setattr(backend, name, _placed(getattr(backend, name)))
    return backend


def _placed(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operation compute on the device of its first operand."""

    @wraps(operation)
    def placed(*arguments: Any, **named: Any) -> Any:
        with _device_of(*arguments, *named.values()):
            return operation(*arguments, **named)

    return placed


def _device_of(*arguments: Any) -> AbstractContextManager[Any]:
    """Return the device of the first array among arguments, which may hold sequences of arrays."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, list | tuple) and argument else argument
        if isinstance(first, cupy.ndarray):
            return first.device
    return nullcontext()


def _turn_off_tf32() -> Callable[[], None] | None:
    """Turn off TF32 and return how to restore it; CuPy has no public function for that."""
    before = products.get_compute_type("float32")  # that of complex64 as well
    if before != products.COMPUTE_TYPE_TF32:
        return None
    products.set_compute_type("float32", products.COMPUTE_TYPE_DEFAULT)
    return lambda: products.set_compute_type("float32", before)


_without_tf32 = ProcessSetting(_turn_off_tf32)


@_on_the_device_of_operands
class CupyBackend(NumpyLike):
    """The protocol of :mod:`tnmoe.backends.protocol` in CuPy."""

    name = "cupy"
    xp = cupy

    def to_numpy(self, array: cupy.ndarray) -> np.ndarray:
        return array.get()

    def from_numpy(self, array: np.ndarray, like: cupy.ndarray | None = None) -> cupy.ndarray:
        return cupy.asarray(array, dtype=None if like is None else like.dtype)

    def on_device(self, like: cupy.ndarray) -> AbstractContextManager[Any]:
        return like.device

    @contextmanager
    def full_precision(self, like: cupy.ndarray) -> Iterator[None]:
        # tnmoe also computes with numbers in NumPy, where a small square may underflow.
        with like.device, _without_tf32.changed(), np.errstate(under="ignore"):
            yield

    def left_svd(self, matrix: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
        u, s = self._or_in_numpy("left_svd", matrix)
        return u, s

    def eigh(self, matrix: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
        values, vectors = self._or_in_numpy("eigh", matrix)
        return values, vectors

    def eigvalsh(self, matrix: cupy.ndarray) -> cupy.ndarray:
        return self._or_in_numpy("eigvalsh", matrix)[0]

    def _or_in_numpy(self, decomposition: str, matrix: cupy.ndarray) -> tuple[cupy.ndarray, ...]:
        """Decompose a matrix in CuPy, or in NumPy where cuSOLVER fails."""
        try:
            # By default, CuPy returns what cuSOLVER leaves after a failure.
            with cupyx.errstate(linalg="raise"):
                found = _as_tuple(getattr(super(), decomposition)(matrix))
            if all(cupy.isfinite(each).all() for each in found):
                return found
        except np.linalg.LinAlgError:
            pass
        found = _as_tuple(getattr(numpy_backend, decomposition)(matrix.get()))
        return tuple(self.from_numpy(each) for each in found)

    def cholesky(self, matrix: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray] | None:
        from cupyx.scipy.linalg import solve_triangular

        try:
            with cupyx.errstate(linalg="raise"):
                triangle = cupy.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return None
        inverse = solve_triangular(triangle, self.eye(triangle.shape[0], matrix), lower=True)
        return (triangle, inverse) if cupy.isfinite(inverse).all() else None


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


backend = CupyBackend()
