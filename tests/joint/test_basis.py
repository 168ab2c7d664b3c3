"""A common basis is the best one; dense SVDs say so."""

import numpy as np
import pytest
import torch

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import InputError
from tnmoe.joint.basis import column_basis, row_basis
from tnmoe.joint.input_moments import InputMoments

E, OUT, IN = 4, 9, 7


def draw(seed=0, complex_=False):
    rng = np.random.default_rng(seed)
    matrices = rng.normal(size=(E, OUT, IN))
    return matrices + 1j * rng.normal(size=(E, OUT, IN)) if complex_ else matrices


def moments_of(size, seed=1):
    factor = np.random.default_rng(seed).normal(size=(size, size + 2))
    return factor @ factor.T / size


def weighted_squares(matrices, others, shares, moments=None):
    root = np.eye(matrices.shape[2]) if moments is None else np.linalg.cholesky(moments)
    return sum(
        share * np.linalg.norm((one - other) @ root) ** 2
        for share, one, other in zip(shares, matrices, others, strict=True)
    )


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_row_basis_has_the_error_of_a_svd_of_all_whitened_matrices(library, weighted, size):
    matrices, shares = draw(), [1.0, 0.5, 2.0, 0.0]
    moments = moments_of(IN) if weighted else None
    basis = row_basis(
        to_library(matrices, library),
        shares=shares,
        moments=None if moments is None else InputMoments.of(to_library(moments, library)),
    )
    written = to_numpy(basis.decompose(to_library(matrices, library), size).to_matrices())
    root = np.eye(IN) if moments is None else np.linalg.cholesky(moments)
    stack = np.concatenate(
        [share**0.5 * each @ root for share, each in zip(shares, matrices, strict=True)]
    )
    values = np.linalg.svd(stack, compute_uv=False)
    expected = (values[size:] ** 2).sum()
    assert np.isclose(basis.squared_errors[size], expected, atol=1e-10)
    assert np.isclose(weighted_squares(matrices, written, shares, moments), expected, atol=1e-10)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_column_basis_is_that_of_a_svd_of_the_matrices_side_by_side(library, size):
    matrices, shares = draw(), [1.0, 0.5, 2.0, 0.0]
    basis = column_basis(to_library(matrices, library), shares=shares)
    written = to_numpy(basis.decompose(to_library(matrices, library), size).to_matrices())
    row = np.concatenate(
        [share**0.5 * each for share, each in zip(shares, matrices, strict=True)], axis=1
    )
    values = np.linalg.svd(row, compute_uv=False)
    expected = (values[size:] ** 2).sum()
    assert np.isclose(basis.squared_errors[size], expected, atol=1e-10)
    assert np.isclose(weighted_squares(matrices, written, shares), expected, atol=1e-10)


def test_a_column_basis_of_outputs_has_the_least_error_of_outputs_for_any_inputs():
    """Every expert has moments of its own."""
    matrices = draw()
    inputs = [moments_of(IN, seed) for seed in range(E)]
    outputs = sum(each @ own @ each.T for each, own in zip(matrices, inputs, strict=True))
    basis = column_basis(matrices, outputs=outputs)
    written = basis.decompose(matrices, 3).to_matrices()
    error = sum(
        np.linalg.norm((one - other) @ np.linalg.cholesky(own)) ** 2
        for one, other, own in zip(matrices, written, inputs, strict=True)
    )
    stack = np.concatenate(
        [each @ np.linalg.cholesky(own) for each, own in zip(matrices, inputs, strict=True)], axis=1
    )
    expected = (np.linalg.svd(stack, compute_uv=False)[3:] ** 2).sum()
    assert np.isclose(error, expected)
    assert np.isclose(basis.squared_errors[3], expected)


def test_bases_of_complex_matrices_are_as_good():
    matrices = draw(complex_=True)
    for basis, stack in (
        (row_basis(matrices), matrices.reshape(-1, IN)),
        (column_basis(matrices), np.concatenate(list(matrices), axis=1)),
    ):
        error = np.linalg.norm(basis.decompose(matrices, 3).to_matrices() - matrices) ** 2
        expected = (np.linalg.svd(stack, compute_uv=False)[3:] ** 2).sum()
        assert np.isclose(error, expected)


@pytest.mark.parametrize("make", [row_basis, column_basis])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_written_matrices_keep_dtype_and_count_their_parameters(make, dtype):
    matrices = torch.as_tensor(draw()).to(dtype)
    form = make(matrices)
    shared = form.decompose(matrices, 2)
    assert shared.cores[0].dtype == dtype
    assert shared.num_params == form.num_params(matrices, 2)
    error = (shared.to_matrices().double() - matrices.double()).square().sum()
    slack = 1 + 20 * torch.finfo(dtype).eps
    norms = matrices.double().square().sum()
    assert float(error) <= slack * form.squared_errors[2] + torch.finfo(dtype).eps * float(norms)


@pytest.mark.parametrize("make", [row_basis, column_basis])
def test_matrices_of_zeros_have_no_error(make):
    matrices = np.zeros((3, 4, 5))
    form = make(matrices)
    assert form.squared_errors[0] == 0
    assert not form.decompose(matrices, 1).to_matrices().any()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_row_basis_weighs_rows_as_a_svd_of_weighed_matrices_does(library, size):
    """The weights of rows reach from 0 to 100, and an expert may lack any."""
    matrices, shares, moments = draw(), [1.0, 0.5, 2.0, 0.1], moments_of(IN)
    rows = np.random.default_rng(3).uniform(0, 10, size=(E, OUT)) ** 2
    rows[0, :3], rows[1] = 0, 0
    basis = row_basis(
        to_library(matrices, library),
        shares=shares,
        moments=InputMoments.of(to_library(moments, library)),
        rows=to_library(rows, library),
    )
    written = to_numpy(basis.decompose(to_library(matrices, library), size).to_matrices())
    root = np.linalg.cholesky(moments)
    factors = np.sqrt(np.array(shares)[:, None] * rows)[:, :, None]
    values = np.linalg.svd((factors * matrices @ root).reshape(-1, IN), compute_uv=False)
    expected = (values[size:] ** 2).sum()
    assert np.isclose(basis.squared_errors[size], expected, atol=1e-9)
    error = np.linalg.norm(factors * (matrices - written) @ root) ** 2
    assert np.isclose(error, expected, atol=1e-9)
    # Rows without weight, too, get the best fit that the basis allows.
    core = to_numpy(basis.decompose(to_library(matrices, library), size).cores[1])[:, 0, :, 0]
    fit = np.linalg.lstsq((core @ root).T, (matrices[1] @ root).T, rcond=None)[0].T
    np.testing.assert_allclose(written[1], fit @ core, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: row_basis(m, shares=[1, 2]), "shares need 4 numbers"),
        (lambda m: row_basis(m, shares=[0, 0, 0, 0]), "not all 0"),
        (lambda m: row_basis(m, shares=[1, -1, 1, 1]), "from 0 up"),
        (lambda m: row_basis(m, rows=np.ones(7)), r"rows must have shape \(4, 9\) or \(9,\)"),
        (lambda m: row_basis(m, rows=-np.ones(9)), "from 0 up"),
        (
            lambda m: row_basis(m, moments=InputMoments.of(np.stack([np.eye(7)] * 4))),
            r"moments must have shape \(7, 7\), got \(4, 7, 7\)",
        ),
        (
            lambda m: row_basis(m, moments=InputMoments.of(np.eye(3))),
            r"moments must have shape \(7, 7\)",
        ),
        (lambda m: column_basis(m, outputs=np.eye(3)), r"outputs must have shape \(9, 9\)"),
        (lambda m: row_basis(m).decompose(m, 8), "size - 1"),
        (lambda m: row_basis(m).decompose(m, 0), "size - 1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(draw())
