"""NumPy falls back to a safer SVD."""

import numpy as np

from tnmoe.backends import backend_named


def test_numpy_svd_falls_back_to_qr_iteration(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    matrix = np.random.default_rng(0).standard_normal((2, 5, 3))
    u, s = backend_named("numpy").left_svd(matrix)
    np.testing.assert_allclose(u @ (u.swapaxes(-1, -2) @ matrix), matrix, atol=1e-12)
    np.testing.assert_allclose((s**2).sum(-1), (matrix**2).sum((-1, -2)))
