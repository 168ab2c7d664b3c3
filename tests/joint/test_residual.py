"""A common matrix with low ranks is no worse than the mean with dense SVDs."""

import numpy as np
import pytest
import torch

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import InputError
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.residual import residual

E, OUT, IN = 4, 9, 7
SHARES = [1.0, 0.5, 2.0, 0.1]


def draw():
    return np.random.default_rng(0).normal(size=(E, OUT, IN))


def moments_of(size):
    factor = np.random.default_rng(1).normal(size=(size, size + 2))
    return factor @ factor.T / size


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("moments", [None, moments_of(IN)], ids=["plain", "weighted"])
@pytest.mark.parametrize("rows", [None, np.arange(1.0, OUT + 1)], ids=["alike", "rows"])
def test_a_common_matrix_with_low_ranks_is_no_worse_than_the_mean_with_svds(library, moments, rows):
    matrices = draw()
    part = residual(
        to_library(matrices, library),
        shares=SHARES,
        moments=None if moments is None else InputMoments.of(to_library(moments, library)),
        rows=None if rows is None else to_library(rows, library),
    )
    root = np.eye(IN) if moments is None else np.linalg.cholesky(moments)
    scale = np.sqrt(np.ones(OUT) if rows is None else rows)[:, None]
    mean = np.einsum("e,eoi->oi", SHARES, matrices) / sum(SHARES)
    values = [np.linalg.svd(scale * (each - mean) @ root, compute_uv=False) for each in matrices]
    for size in (1, 3):
        expected = sum(s * (v[size:] ** 2).sum() for s, v in zip(SHARES, values, strict=True))
        assert np.isclose(part.squared_errors[size], expected)
        written = to_numpy(part.decompose(to_library(matrices, library), size).to_matrices())
        squares = [np.linalg.norm(scale * each @ root) ** 2 for each in matrices - written]
        error = np.dot(SHARES, squares)
        assert error <= expected * (1 + 1e-9)
        assert error < 0.999 * expected or size == 3


@pytest.mark.parametrize("moments", [None, moments_of(IN)], ids=["plain", "weighted"])
@pytest.mark.parametrize("rows", [None, np.arange(1.0, OUT + 1)], ids=["alike", "rows"])
def test_errors_are_told_beside_the_norm_of_the_matrices(moments, rows):
    matrices = 100 + draw()  # far larger than their distances from the mean
    weights = None if moments is None else InputMoments.of(moments)
    part = residual(matrices, shares=SHARES, moments=weights, rows=rows)
    root = np.eye(IN) if moments is None else np.linalg.cholesky(moments)
    scale = np.sqrt(np.ones(OUT) if rows is None else rows)[:, None]
    squares = [np.linalg.norm(scale * each @ root) ** 2 for each in matrices]
    assert np.isclose(part.squared_norm, np.dot(SHARES, squares))
    assert part.squared_errors[0] < 0.01 * part.squared_norm


def test_rows_of_experts_count_with_their_mean():
    matrices = draw()
    rows = np.random.default_rng(2).uniform(size=(E, OUT))
    own = residual(matrices, shares=SHARES, rows=rows)
    mean = residual(matrices, shares=SHARES, rows=np.average(rows, axis=0, weights=SHARES))
    np.testing.assert_allclose(own.squared_errors, mean.squared_errors)


def test_rows_without_weight_stay_finite():
    rows = np.where(np.arange(OUT) < 4, 0.0, 1.0)
    matrices = draw()
    written = residual(matrices, rows=rows).decompose(matrices, 2).to_matrices()
    assert np.isfinite(written).all()
    plain = residual(matrices[:, 4:]).decompose(matrices[:, 4:], 2).to_matrices()
    np.testing.assert_allclose(written[:, 4:], plain, atol=1e-4)


@pytest.mark.parametrize("rows", [None, np.arange(1.0, OUT + 1)], ids=["alike", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_written_matrices_keep_dtype_and_count_their_parameters(dtype, rows):
    matrices = torch.as_tensor(draw()).to(dtype)
    weights = None if rows is None else torch.as_tensor(rows)
    form = residual(matrices, rows=weights)
    shared = form.decompose(matrices, 2)
    assert shared.cores[0].dtype == shared.base.cores[0].dtype == dtype
    assert shared.num_params == form.num_params(matrices, 2)
    scale = np.sqrt(np.ones(OUT) if rows is None else rows)[:, None]
    whole = scale * matrices.double().numpy()
    error = np.linalg.norm(scale * shared.to_matrices().double().numpy() - whole) ** 2
    eps = torch.finfo(dtype).eps
    assert error <= (1 + 20 * eps) * form.squared_errors[2] + eps * np.linalg.norm(whole) ** 2


@pytest.mark.parametrize("rows", [None, np.zeros(4)])
def test_matrices_of_zeros_have_no_error(rows):
    matrices = np.zeros((3, 4, 5))
    form = residual(matrices, rows=rows)
    assert form.squared_errors[0] == 0
    assert not form.decompose(matrices, 1).to_matrices().any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: residual(m, shares=[1, -1, 1, 1]), "from 0 up"),
        (
            lambda m: residual(m, moments=InputMoments.of(np.eye(3))),
            r"moments must have shape \(7, 7\)",
        ),
        (lambda m: residual(m, rows=np.full(OUT, np.nan)), "finite numbers"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(draw())
