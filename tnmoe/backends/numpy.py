"""The backend of NumPy arrays."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np

from tnmoe.backends.numpy_like import NumpyLike


class NumpyBackend(NumpyLike):
    """The protocol of :mod:`tnmoe.backends.protocol` in NumPy."""

    name = "numpy"
    xp = np

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def from_numpy(self, array: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        return array if like is None else array.astype(like.dtype, copy=False)

    def full_precision(self, like: np.ndarray) -> AbstractContextManager[None]:
        # A small square may underflow in a sum, even where the caller made underflow an error.
        return np.errstate(under="ignore")

    def left_svd(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return super().left_svd(matrix)
        except np.linalg.LinAlgError:
            if matrix.ndim > 2:
                pairs = [self.left_svd(single) for single in matrix]
                return np.stack([u for u, _ in pairs]), np.stack([s for _, s in pairs])
            # QR iteration (gesvd) converges where divide and conquer (gesdd) can fail.
            from scipy.linalg import svd

            return svd(matrix, full_matrices=False, lapack_driver="gesvd")[:2]

    def cholesky(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        from scipy.linalg import solve_triangular

        try:
            triangle = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return None
        return triangle, solve_triangular(triangle, self.eye(triangle.shape[0], matrix), lower=True)


backend = NumpyBackend()
