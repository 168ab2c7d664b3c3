"""What an array library must offer: the operations that libraries spell differently.

The rest is spelt alike in all of them and is used directly. An array has

- ``shape``, ``ndim``, ``dtype`` (any object that can be compared and printed), ``real``, ``imag``,
- ``reshape(*sizes)`` or ``reshape(sizes)``, and ``clip(least)``,
- indexing by integers, slices, ``...`` and ``None``, and iteration along the first axis,
- ``+ - * / **``, negation and ``==``, with arrays that broadcast and with Python's numbers, which
  leave the precision of the array as it is,
- ``@``, with leading axes as a batch,
- ``float(array)`` for one number.

It is never written into, and never given to a function of NumPy.
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

# Half precision has no linear algebra; it is computed in float32 and rounded at the end.
COMPUTE_DTYPE = {"float16": "float32", "bfloat16": "float32"}
# The dtype in which sums of squares of a dtype lose nothing that it can hold.
WIDE_DTYPE = {"float32": "float64", "complex64": "complex128"}
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
    """One array library. Arrays keep their device throughout.

    In every method ``array`` is an array of the library, ``arrays`` a sequence of them, ``matrix``
    one with matrices along its last two axes, leading axes being a batch, and ``like`` an array
    whose dtype and device the result gets.
    """

    name: str

    def dtype_name(self, array: Array) -> str:
        """Name of the dtype, as NumPy spells it (plus ``bfloat16``)."""

    def astype(self, array: Array, dtype: str) -> Array:
        """The array in the dtype of that name; itself where it has that ``dtype`` already.

        Raises a TypeError where the library has no such dtype.
        """

    def to_numpy(self, array: Array) -> np.ndarray:
        """A NumPy copy or view, detached from any gradient; bfloat16 as float32."""

    def from_numpy(self, array: np.ndarray, like: Array | None = None) -> Array:
        """A NumPy array as one of this library.

        Without ``like`` the dtype stays and the array is on the CPU.
        """

    def full_precision(self, like: Array) -> AbstractContextManager[None]:
        """A block in which products on the device of ``like`` have the precision of their dtype.

        Whatever makes products rougher outside, such as ``torch.autocast`` or TF32, does not count
        in the block. Blocks may lie inside each other, and in several threads at once.
        """

    def tracked(self, array: Array) -> bool:
        """Whether gradients flow through what is computed from the array."""

    def max_abs(self, array: Array) -> float:
        """Largest absolute real or imaginary part; NaN if there is one, 0 for an empty array."""

    def norm(self, array: Array) -> Array:
        """Euclidean norm of all entries, a real scalar; squares neither over- nor underflow."""

    def conj(self, array: Array) -> Array:
        """Complex conjugate; real arrays unchanged."""

    def permute(self, array: Array, axes: Sequence[int]) -> Array:
        """The axes in the order of ``axes``."""

    def transpose(self, matrix: Array) -> Array:
        """Rows and columns swapped."""

    def adjoint(self, matrix: Array) -> Array:
        """Conjugate transpose."""

    def trace(self, array: Array, first: int, second: int) -> Array:
        """Sum over the diagonal of two axes of one size, ``first`` and ``second``.

        Negative ones count from the last.
        """

    def pad(self, matrix: Array, rows: int, columns: int) -> Array:
        """The matrix with zeros added at its end, until it has ``rows`` and ``columns``."""

    def stack(self, arrays: Sequence[Array]) -> Array:
        """Arrays of one shape along a new first axis."""

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        """Arrays joined along ``axis``."""

    def zeros(self, shape: Sequence[int], like: Array) -> Array:
        """Zeros of a ``shape``."""

    def eye(self, size: int, like: Array) -> Array:
        """Identity matrix of ``size`` rows."""

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: Array) -> Array:
        """Standard normal numbers of a ``shape`` from ``rng``; complex ones have variance 1."""

    # Where a library has gradients, those of qr, left_svd and eigh stay finite for singular
    # matrices and equal singular values; they are right for every function of the result that does
    # not depend on the arbitrary choices inside it (signs, phases, bases of equal singular values).

    def qr(self, matrix: Array) -> tuple[Array, Array]:
        """Reduced QR decomposition."""

    def left_svd(self, matrix: Array) -> tuple[Array, Array]:
        """U and s of a reduced SVD, s descending; falls back to slower, safer algorithms."""

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        """Eigenvalues of a Hermitian matrix, descending, and its eigenvectors in columns."""

    def eigvalsh(self, matrix: Array) -> Array:
        """Only the eigenvalues of a Hermitian matrix, descending."""

    def triangle(self, matrix: Array) -> Array:
        """The small factor T of A = T Q, for A wider than tall: T Tᴴ = A Aᴴ without squaring."""
