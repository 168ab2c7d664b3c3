"""The backend of NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np


class NumpyBackend:
    """The protocol of :mod:`tnmoe.backends.protocol` in NumPy."""

    name = "numpy"

    def __repr__(self) -> str:
        return f"<backend of {self.name}>"

    def dtype_name(self, array: np.ndarray) -> str:
        return array.dtype.name

    def astype(self, array: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "bfloat16":  # np.dtype knows it only after another library registered it
            raise TypeError("NumPy has no bfloat16")
        return array.astype(dtype, copy=False)

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def from_numpy(self, array: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        return array if like is None else array.astype(like.dtype, copy=False)

    def max_abs(self, array: np.ndarray) -> float:
        if np.iscomplexobj(array):
            return float(np.maximum(self.max_abs(array.real), self.max_abs(array.imag)))
        # Two passes without a copy; both give NaN if the array holds one.
        return float(max(array.max(), -array.min())) if array.size else 0.0

    def norm(self, array: np.ndarray) -> np.ndarray:
        scale = self.max_abs(array) or 1.0
        wide = np.complex128 if np.iscomplexobj(array) else np.float64
        norm = np.linalg.norm(array.astype(wide).ravel() / scale) * scale
        return norm.astype(array.real.dtype)

    def conj(self, array: np.ndarray) -> np.ndarray:
        return array.conj() if np.iscomplexobj(array) else array

    def permute(self, array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        return array.transpose(axes)

    def transpose(self, matrix: np.ndarray) -> np.ndarray:
        return matrix.swapaxes(-1, -2)

    def adjoint(self, matrix: np.ndarray) -> np.ndarray:
        return self.conj(matrix).swapaxes(-1, -2)

    def trace(self, array: np.ndarray, first: int, second: int) -> np.ndarray:
        return array.trace(axis1=first, axis2=second)

    def pad(self, matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
        padded = np.zeros((*matrix.shape[:-2], rows, columns), dtype=matrix.dtype)
        padded[..., : matrix.shape[-2], : matrix.shape[-1]] = matrix
        return padded

    def stack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(arrays)

    def concatenate(self, arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(arrays, axis)

    def zeros(self, shape: Sequence[int], like: np.ndarray) -> np.ndarray:
        return np.zeros(tuple(shape), like.dtype)

    def eye(self, size: int, like: np.ndarray) -> np.ndarray:
        return np.eye(size, dtype=like.dtype)

    def normal(
        self, shape: Sequence[int], rng: np.random.Generator, like: np.ndarray
    ) -> np.ndarray:
        numbers = rng.standard_normal(shape)
        if np.iscomplexobj(like):
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return numbers.astype(like.dtype)

    def full_precision(self, like: np.ndarray) -> AbstractContextManager[None]:
        # A small square may underflow in a sum, even where the caller made underflow an error.
        return np.errstate(under="ignore")

    def tracked(self, array: np.ndarray) -> bool:
        return False

    def qr(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.linalg.qr(matrix)

    def left_svd(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return np.linalg.svd(matrix, full_matrices=False)[:2]
        except np.linalg.LinAlgError:
            if matrix.ndim > 2:
                pairs = [self.left_svd(single) for single in matrix]
                return np.stack([u for u, _ in pairs]), np.stack([s for _, s in pairs])
            # QR iteration (gesvd) converges where divide and conquer (gesdd) can fail.
            from scipy.linalg import svd

            return svd(matrix, full_matrices=False, lapack_driver="gesvd")[:2]

    def eigh(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(matrix)
        return values[..., ::-1], vectors[..., ::-1]

    def eigvalsh(self, matrix: np.ndarray) -> np.ndarray:
        return np.linalg.eigvalsh(matrix)[..., ::-1]

    def cholesky(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        from scipy.linalg import solve_triangular

        try:
            triangle = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return None
        return triangle, solve_triangular(triangle, self.eye(triangle.shape[0], matrix), lower=True)

    def triangular_factor(self, matrix: np.ndarray) -> np.ndarray:
        return self.adjoint(np.asarray(np.linalg.qr(self.adjoint(matrix), mode="r")))


backend = NumpyBackend()
