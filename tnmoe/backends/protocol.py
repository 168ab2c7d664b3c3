"""The protocol of a backend: the operations that array libraries spell differently.

tnmoe uses directly what all libraries spell alike. An array has

- ``shape``, ``ndim``, ``dtype`` (any object that can be compared and printed), ``real``, ``imag``,
- ``reshape(*sizes)`` or ``reshape(sizes)``, and ``clip(least)``,
- indexing by integers, slices, ``...`` and ``None``, and iteration along the first axis,
- ``+ - * / **``, negation and ``==``, with arrays that broadcast and with Python's numbers, which
  leave the precision of the array as it is,
- ``@``, with leading axes as a batch,
- ``float(array)`` for an array of one number.

tnmoe never writes into an array, and never passes one to a function of NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

# An array of any supported library.
Array = Any

REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")

# Libraries lack linear algebra in half precision: tnmoe computes in float32 and rounds at the end.
COMPUTE_DTYPE = {"float16": "float32", "bfloat16": "float32"}
# The dtype in which a sum of squares loses nothing that the dtype itself can hold.
WIDE_DTYPE = {"float32": "float64", "complex64": "complex128"}
# The largest finite number of a dtype, and the distance from 1 to the next number. They stand here
# because NumPy does not know bfloat16.
LARGEST = {
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float64": (2 - 2.0**-52) * 2.0**1023,
    "complex64": (2 - 2.0**-23) * 2.0**127,
    "complex128": (2 - 2.0**-52) * 2.0**1023,
}
EPSILON = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}


class Backend(Protocol):
    """One array library. Every result is on the device of its operands.

    In every method, ``array`` is an array of the library and ``arrays`` a sequence of arrays.
    ``matrix`` holds matrices in its last two axes; leading axes are a batch. The result gets the
    dtype and the device of ``like``.
    """

    name: str

    def dtype_name(self, array: Array) -> str:
        """Return the name of the dtype as NumPy spells it, or ``bfloat16``."""

    def astype(self, array: Array, dtype: str) -> Array:
        """Return the array in the dtype named ``dtype``, or itself if it has that dtype already.

        Raise a TypeError if the library has no such dtype.
        """

    def to_numpy(self, array: Array) -> np.ndarray:
        """Return a NumPy copy or view without gradients; bfloat16 becomes float32."""

    def from_numpy(self, array: np.ndarray, like: Array | None = None) -> Array:
        """Turn a NumPy array into one of this library.

        Without ``like``, the result keeps the dtype and is on the CPU, or on the current device if
        the library has no arrays on the CPU.
        """

    def on_device(self, like: Array) -> AbstractContextManager[Any]:
        """Make operators, such as ``@``, compute on the device of ``like`` in a block.

        Where operators follow their operands, as in most libraries, the block changes nothing.
        """

    def full_precision(self, like: Array) -> AbstractContextManager[None]:
        """Give products on the device of ``like`` the full precision of their dtype in a block.

        In the block, operators compute on that device, as in one of :meth:`on_device`.
        Settings that lower the precision of products, such as ``torch.autocast`` or TF32, have no
        effect in the block. Blocks may be nested, and may run in several threads at once.
        """

    def tracked(self, array: Array) -> bool:
        """Check whether gradients flow through results that are computed from the array."""

    def has_numbers(self, array: Array) -> bool:
        """Check whether the array holds numbers, and not only stands for them.

        The result is False while the library traces a function, as JAX does in its transformations.
        tnmoe then computes in the dtype of the array, without a look at its numbers: it checks for
        neither NaN nor overflow, scales nothing, and keeps as many Schmidt values as bonds allow.
        """

    def max_abs(self, array: Array) -> float:
        """Return the largest absolute real or imaginary part.

        The result is NaN if the array holds a NaN, and 0 if the array is empty.
        """

    def norm(self, array: Array) -> Array:
        """Return the Euclidean norm of all entries, a real scalar.

        Squares of entries neither overflow nor underflow on the way.
        """

    def conj(self, array: Array) -> Array:
        """Return the complex conjugate; a real array comes back unchanged."""

    def permute(self, array: Array, axes: Sequence[int]) -> Array:
        """Put the axes into the order of ``axes``."""

    def transpose(self, matrix: Array) -> Array:
        """Swap rows and columns."""

    def adjoint(self, matrix: Array) -> Array:
        """Return the conjugate transpose."""

    def trace(self, array: Array, first: int, second: int) -> Array:
        """Sum over the diagonal of the axes ``first`` and ``second``, which have the same size.

        A negative axis counts from the last.
        """

    def pad(self, matrix: Array, rows: int, columns: int) -> Array:
        """Append zeros until the matrix has ``rows`` rows and ``columns`` columns."""

    def stack(self, arrays: Sequence[Array]) -> Array:
        """Stack arrays of one shape along a new first axis."""

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        """Join arrays along ``axis``."""

    def zeros(self, shape: Sequence[int], like: Array) -> Array:
        """Return an array of zeros with a ``shape``."""

    def eye(self, size: int, like: Array) -> Array:
        """Return the identity matrix with ``size`` rows."""

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: Array) -> Array:
        """Draw normal numbers of a ``shape`` from ``rng``, complex ones with variance 1."""

    # Where a library has gradients, those of qr, left_svd and eigh stay finite for singular
    # matrices and for equal singular values. They are right for every function of the result
    # that does not depend on arbitrary choices: signs, phases, bases of equal singular values.

    def qr(self, matrix: Array) -> tuple[Array, Array]:
        """Return the reduced QR decomposition."""

    def left_svd(self, matrix: Array) -> tuple[Array, Array]:
        """Return U and s of a reduced SVD, largest singular value first.

        Fall back to slower and safer algorithms where the usual one does not converge.
        """

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        """Return eigenvalues of a Hermitian matrix, largest first, and eigenvectors as columns."""

    def eigvalsh(self, matrix: Array) -> Array:
        """Return only the eigenvalues of a Hermitian matrix, largest first."""

    def cholesky(self, matrix: Array) -> tuple[Array, Array] | None:
        """Return L and L⁻¹ of A = L Lᴴ, with L lower triangular, for one Hermitian matrix.

        The result is None if the matrix is not positive definite, or only within rounding.
        """

    def triangular_factor(self, matrix: Array) -> Array:
        """Return the small factor T of A = T Q, for a matrix that is wider than tall.

        T Tᴴ = A Aᴴ, without squaring A.
        """
