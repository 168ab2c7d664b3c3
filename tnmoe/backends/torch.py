"""PyTorch tensors, on any device; gradients flow wherever PyTorch defines them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TorchBackend:
    """The protocol of :mod:`tnmoe.backends.protocol` in PyTorch."""

    name = "torch"

    def dtype_name(self, array: Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")

    def astype(self, array: Tensor, dtype: str) -> Tensor:
        return array.to(getattr(torch, dtype))

    def to_numpy(self, array: Tensor) -> np.ndarray:
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    def from_numpy(self, array: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, like.dtype)

    def all_finite(self, array: Tensor) -> bool:
        return bool(torch.isfinite(array).all())

    def max_abs(self, array: Tensor) -> float:
        return float(array.detach().abs().max()) if array.numel() else 0.0

    def norm(self, array: Tensor) -> Tensor:
        scale = self.max_abs(array) or 1.0
        wide = torch.complex128 if array.is_complex() else torch.float64
        norm = torch.linalg.vector_norm(array / scale, dtype=wide) * scale
        return norm.to(array.real.dtype)

    def conj(self, array: Tensor) -> Tensor:
        return array.conj() if array.is_complex() else array

    def permute(self, array: Tensor, axes: Sequence[int]) -> Tensor:
        return array.permute(*axes)

    def pad(self, matrix: Tensor, rows: int, columns: int) -> Tensor:
        return torch.nn.functional.pad(
            matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
        )

    def stack(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(arrays))

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: Tensor) -> Tensor:
        # Drawn by NumPy so that one seed gives the same numbers on every library and device.
        numbers = rng.standard_normal(shape)
        if like.is_complex():
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return self.from_numpy(numbers, like)

    def qr(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(matrix)

    def svd(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return torch.linalg.svd(matrix, full_matrices=False)
        except torch.linalg.LinAlgError:
            return self._safe_svd(matrix)

    def _safe_svd(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slow ways: QR iteration on the GPU, then double precision on the CPU."""
        if matrix.is_cuda:
            try:
                return torch.linalg.svd(matrix, full_matrices=False, driver="gesvd")
            except torch.linalg.LinAlgError:
                pass
        wide = torch.complex128 if matrix.is_complex() else torch.float64
        u, s, vh = torch.linalg.svd(matrix.to("cpu", wide), full_matrices=False)
        return u.to(matrix), s.to(matrix.device, matrix.real.dtype), vh.to(matrix)

    def eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0), vectors.flip(1)


backend = TorchBackend()
