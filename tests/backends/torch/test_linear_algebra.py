"""Decompositions of torch are finite and precise where LAPACK fails."""

import pytest
import torch

from tnmoe.backends import backend_named


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("rows", [2, 3])
def test_torch_qr_of_complex_numbers_below_the_normal_ones_is_finite(rows, tracked):
    """LAPACK's, in single precision, makes NaN of such a column."""
    matrix = torch.eye(rows, 2, dtype=torch.complex64)
    matrix[1, 1] = complex(1e-40, 1e-40)
    matrix = matrix.requires_grad_(tracked)
    xp = backend_named("torch")
    isometry, rest = xp.qr(matrix)
    assert isometry.dtype == rest.dtype == torch.complex64
    torch.testing.assert_close((isometry @ rest).detach(), matrix.detach())
    torch.testing.assert_close((isometry.mH @ isometry).detach(), torch.eye(2) + 0j)
    triangle = xp.triangular_factor(matrix.mH)
    torch.testing.assert_close((triangle @ triangle.mH).detach(), (matrix.mH @ matrix).detach())


def test_torch_svd_falls_back_to_double_precision(monkeypatch):
    real_svd = torch.linalg.svd

    def fails_in_single(matrix, **kwargs):
        if matrix.dtype == torch.complex64:
            raise torch.linalg.LinAlgError("SVD did not converge")
        return real_svd(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_single)
    matrix = torch.randn(5, 3, dtype=torch.complex64)
    u, s = backend_named("torch").left_svd(matrix)
    assert (u.dtype, s.dtype) == (torch.complex64, torch.float32)
    torch.testing.assert_close(u @ (u.mH @ matrix), matrix)
