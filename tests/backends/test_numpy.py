"""NumPy falls back to a safer SVD, and has no dtype of other libraries."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe.backends import backend_named
from tnmoe.errors import InputError

SHAPE = tn.MPOShape((2, 2), (2, 2))


def test_numpy_svd_falls_back_to_qr_iteration(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    matrix = np.random.default_rng(0).standard_normal((2, 5, 3))
    u, s = backend_named("numpy").left_svd(matrix)
    np.testing.assert_allclose(u @ (u.swapaxes(-1, -2) @ matrix), matrix, atol=1e-12)
    np.testing.assert_allclose((s**2).sum(-1), (matrix**2).sum((-1, -2)))


def as_bfloat16(array):
    """Return an array of a dtype that JAX registers with NumPy."""
    return array.astype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tn.decompose(as_bfloat16(np.ones((4, 4))), SHAPE, max_bond=2),
        lambda: tn.decompose_batch(as_bfloat16(np.ones((3, 4, 4))), SHAPE, max_bond=2),
        lambda: tn.decompose_streamed(as_bfloat16(np.ones((4, 4))), SHAPE, max_bond=2),
        lambda: tn.cross(lambda rows, columns: as_bfloat16(rows + columns + 1.0), SHAPE),
        lambda: tn.MPO([as_bfloat16(np.ones((1, 2, 2, 1)))]),
    ],
    ids=["decompose", "decompose_batch", "decompose_streamed", "cross", "MPO"],
)
def test_a_dtype_that_numpy_has_from_another_library_is_refused_before_any_work(call):
    with pytest.raises(InputError, match="has no bfloat16"):
        call()
