"""Decompositions of torch with safer algorithms to fall back on; no gradients of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def qr(matrix: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Return a QR decomposition, computed again in double precision where LAPACK made NaN."""
    q, r = torch.linalg.qr(matrix, mode=mode)
    # On a CPU, LAPACK turns complex columns of subnormal numbers into NaN in single precision.
    if matrix.dtype == torch.complex64 and matrix.device.type == "cpu":
        sound = torch.isfinite(q).all() and torch.isfinite(r).all()
        if not sound and torch.isfinite(matrix).all():
            q, r = torch.linalg.qr(matrix.to(torch.complex128), mode=mode)
    return q.to(matrix.dtype), r.to(matrix.dtype)


def svd(matrix: Tensor, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return an SVD; after a failure, try QR iteration on the GPU, then float64 on the CPU."""
    try:
        return torch.linalg.svd(matrix, full_matrices=full)
    except torch.linalg.LinAlgError:
        pass
    if matrix.is_cuda:
        try:
            return torch.linalg.svd(matrix, full_matrices=full, driver="gesvd")
        except torch.linalg.LinAlgError:
            pass
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    u, s, vh = torch.linalg.svd(matrix.to("cpu", wide), full_matrices=full)
    return u.to(matrix), s.to(matrix.device, matrix.real.dtype), vh.to(matrix)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a Hermitian matrix, largest first, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)
