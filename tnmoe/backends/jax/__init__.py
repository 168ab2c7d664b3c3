"""The backend of JAX arrays, and of the tracers that stand for them in JAX's transformations.

Importing it also makes operators pytrees: see :mod:`tnmoe.backends.jax.pytrees`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from tnmoe.backends.jax import gradients
from tnmoe.backends.jax.pytrees import register_operators
from tnmoe.backends.numpy_like import NumpyLike
from tnmoe.backends.protocol import WIDE_DTYPE
from tnmoe.errors import InputError

_DOUBLE = ("float64", "complex128")


class JaxBackend(NumpyLike):
    """The protocol of :mod:`tnmoe.backends.protocol` in JAX."""

    name = "jax"
    xp = jnp

    def astype(self, array: jax.Array, dtype: str) -> jax.Array:
        if array.dtype.name == dtype:
            return array
        if dtype in _DOUBLE and not _has_double():
            raise TypeError(f"JAX has {dtype} only with jax.config.update('jax_enable_x64', True)")
        return array.astype(dtype)

    def to_numpy(self, array: jax.Array) -> np.ndarray:
        _check_numbers(array)
        is_half = array.dtype.name == "bfloat16"
        return np.asarray(array, np.float32 if is_half else None)

    def from_numpy(self, array: np.ndarray, like: jax.Array | None = None) -> jax.Array:
        if like is None:
            return jnp.array(array)
        return jnp.array(array, like.dtype, device=_device(like))

    def max_abs(self, array: jax.Array) -> float:
        _check_numbers(array)
        with jax.ensure_compile_time_eval():
            return float(_max_abs(array)) if array.size else 0.0

    def norm(self, array: jax.Array) -> jax.Array:
        name = array.dtype.name
        with self.full_precision(array):
            wide = array.astype(WIDE_DTYPE.get(name, name)) if self.has_numbers(array) else array
            return _norm(wide).astype(array.real.dtype)

    def pad(self, matrix: jax.Array, rows: int, columns: int) -> jax.Array:
        more = ((0, rows - matrix.shape[-2]), (0, columns - matrix.shape[-1]))
        return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [*more])

    def zeros(self, shape: Sequence[int], like: jax.Array) -> jax.Array:
        return jnp.zeros(tuple(shape), like.dtype, device=_device(like))

    def eye(self, size: int, like: jax.Array) -> jax.Array:
        return jnp.eye(size, dtype=like.dtype, device=_device(like))

    def full_precision(self, like: jax.Array) -> AbstractContextManager[None]:
        return _full_precision(self.has_numbers(like))

    def tracked(self, array: jax.Array) -> bool:
        return isinstance(array, Tracer)

    def has_numbers(self, array: jax.Array) -> bool:
        return not isinstance(array, Tracer)

    def qr(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        if matrix.shape[-2] > matrix.shape[-1]:
            return gradients.tall_qr(matrix)
        # A square unitary Q is a change of basis: Q Qᴴ A = A for every Q, so Q may be constant.
        q, r = jnp.linalg.qr(lax.stop_gradient(matrix))
        return (q, self.adjoint(q) @ matrix) if self.tracked(matrix) else (q, r)

    def left_svd(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, s = gradients.left_svd(matrix)
        return u[..., : s.shape[-1]], s

    def eigh(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gradients.eigh(matrix)

    def eigvalsh(self, matrix: jax.Array) -> jax.Array:
        if self.tracked(matrix):
            return gradients.eigh(matrix)[0]
        return jnp.linalg.eigvalsh(matrix)[..., ::-1]

    def cholesky(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        _check_numbers(matrix)
        triangle = jnp.linalg.cholesky(matrix)
        if not bool(jnp.isfinite(triangle).all()):
            return None
        eye = self.eye(triangle.shape[0], like=matrix)
        return triangle, jax.scipy.linalg.solve_triangular(triangle, eye, lower=True)

    def triangular_factor(self, matrix: jax.Array) -> jax.Array:
        return gradients.triangular_factor(matrix)


def _check_numbers(array: jax.Array) -> None:
    """Raise an InputError for a tracer, whose numbers are not known yet."""
    if isinstance(array, Tracer):
        raise InputError(
            "jax.jit, jax.grad and jax.vmap hide the numbers in an array, on which tolerances, "
            "ranks and measured errors depend: give bonds or max_bond, or do this outside of the "
            "transformed function"
        )


def _device(like: jax.Array) -> Any:
    """Return the device that an array was put on; None if JAX may choose it."""
    if isinstance(like, Tracer) or not like.committed:
        return None
    return like.device if isinstance(like.device, jax.Device) else None


def _has_double() -> bool:
    """Return whether JAX leaves float64 as it is, here and now."""
    return jax.dtypes.canonicalize_dtype("float64") == np.float64


@contextmanager
def _full_precision(has_numbers: bool) -> Iterator[None]:
    """Give products the precision of their dtype, and let float32 become float64.

    In a function that JAX traces, arrays from outside have numbers, and keep them: JAX computes
    with these at once. The dtypes of tracers stay as they are: the derivative is computed after the
    block, where float64 may not exist.
    """
    with (
        jax.enable_x64(has_numbers or _has_double()),
        jax.ensure_compile_time_eval() if has_numbers else nullcontext(),
        jax.default_matmul_precision("highest"),
        np.errstate(under="ignore"),
    ):
        yield


@jax.jit
def _max_abs(array: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        return jnp.maximum(jnp.abs(array.real).max(), jnp.abs(array.imag).max())
    return jnp.abs(array).max()


@jax.jit
def _norm(array: jax.Array) -> jax.Array:
    """Divide by the largest entry, so that no square over- or underflows."""
    parts = jnp.stack([array.real, array.imag]) if jnp.iscomplexobj(array) else array
    largest = lax.stop_gradient(jnp.abs(parts).max(initial=0))
    scale = jnp.where(largest > 0, largest, 1)
    squared = ((parts / scale) ** 2).sum()
    # The root has no derivative at 0. There it counts as 0, as in other libraries.
    root = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    return jnp.where(jnp.isnan(largest), jnp.nan, root * scale)


backend = JaxBackend()
register_operators()
