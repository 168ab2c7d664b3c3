"""Decompositions that keep outputs, against dense algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    KINDS,
    LIBRARIES,
    dense_norm,
    libraries,
    make_matrix,
    shapes,
    to_library,
    to_numpy,
)

SHAPE = tn.MPOShape((2, 3, 2), (3, 2, 2))


def gaussian(*size, seed=0, dtype="float64"):
    numbers = np.random.default_rng(seed).standard_normal((2, *size))
    return (numbers[0] + (1j * numbers[1] if "complex" in dtype else 0)).astype(dtype)


def moments_of(size, dtype="float64", samples=4, seed=0):
    """Second moments of inputs that are strong in a few directions."""
    inputs = gaussian(size, samples * size, seed=seed, dtype=dtype)
    turn = np.linalg.qr(gaussian(size, size, seed=seed + 1, dtype=dtype))[0]
    inputs = turn @ (inputs * np.linspace(3, 0.05, size)[:, None])
    return (inputs @ inputs.conj().T / (samples * size)).astype(dtype)


def damped(moments, damping=0.01):
    size = len(moments)
    mean = np.trace(moments).real / size
    return (1 - damping) * moments / mean + damping * np.eye(size)


def weighted_norm(matrix, moments):
    return float(np.sqrt(max(0.0, np.trace(matrix @ moments @ matrix.conj().T).real)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bond", [1, 4, 10])
def test_two_sites_are_the_whitened_svd(bond, library, dtype):
    matrix, moments = gaussian(12, 10, dtype=dtype), moments_of(10, dtype)
    mpo, info = tn.decompose(
        to_library(matrix, library),
        tn.MPOShape((12, 1), (1, 10)),
        max_bond=bond,
        weights=to_library(moments, library),
        return_info=True,
    )
    whole = damped(moments)
    values = np.linalg.svd(matrix @ np.linalg.cholesky(whole), compute_uv=False)
    atol = 1e-5 if dtype in ("float32", "complex64") else 1e-12
    missed = matrix - to_numpy(mpo.to_matrix())
    norm = weighted_norm(matrix, whole)
    assert np.isclose(weighted_norm(missed, whole), np.linalg.norm(values[bond:]), atol=10 * atol)
    assert np.isclose(info.weighted_error, np.linalg.norm(values[bond:]) / norm, atol=10 * atol)
    assert np.isclose(info.discarded[0], np.linalg.norm(values[bond:]), atol=10 * atol)
    assert np.isclose(info.measured_error, np.linalg.norm(missed), atol=10 * atol)
    np.testing.assert_allclose(to_numpy(info.spectra[0]), values, atol=10 * atol)
    left = to_numpy(mpo.cores[1 - mpo.center_site]).reshape(12, bond) if mpo.center_site else None
    if left is not None:
        np.testing.assert_allclose(left.conj().T @ left, np.eye(bond), atol=10 * atol)


@pytest.mark.parametrize("site", [0, 1, 2])
def test_a_sweep_is_enough_where_all_input_legs_stand_at_one_site(site, monkeypatch):
    monkeypatch.setattr("tnmoe.weighted.fit_shared", None)  # least squares would fail
    in_dims = [1, 1, 1]
    in_dims[site] = 10
    shape, matrix = tn.MPOShape((3, 2, 2), in_dims), gaussian(12, 10)
    moments = moments_of(10)
    mpo, info = tn.decompose(matrix, shape, max_bond=3, weights=moments, return_info=True)
    whole = damped(moments)
    whitened = tn.decompose(matrix @ np.linalg.cholesky(whole), shape, max_bond=3)
    expected = whitened.to_matrix() @ np.linalg.inv(np.linalg.cholesky(whole))
    np.testing.assert_allclose(mpo.to_matrix(), expected, atol=1e-10)
    bound = np.linalg.norm(info.discarded) / weighted_norm(matrix, whole)
    assert np.isclose(info.weighted_error, bound)


def test_a_sweep_is_enough_where_moments_are_a_product_over_the_sites(monkeypatch):
    monkeypatch.setattr("tnmoe.weighted.fit_shared", None)
    parts = [moments_of(size, seed=size) for size in (3, 4)]
    shape, matrix = tn.MPOShape((4, 3), (3, 4)), gaussian(12, 12)
    moments = np.kron(*parts)
    _, info = tn.decompose(
        matrix, shape, max_bond=5, weights=moments, damping=0.0, return_info=True
    )
    roots = [np.linalg.cholesky(each) for each in parts]
    whitened = (matrix @ np.kron(*roots)).reshape(4, 3, 3, 4).transpose(0, 2, 1, 3)
    values = np.linalg.svd(whitened.reshape(12, 12), compute_uv=False)
    best = np.linalg.norm(values[5:]) / np.linalg.norm(values)
    assert np.isclose(info.weighted_error, best, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_lower_the_weighted_error(library, dtype):
    matrix, moments = gaussian(12, 12, dtype=dtype), moments_of(12, dtype)
    shape = tn.MPOShape((2, 3, 2), (3, 2, 2))
    mpo, info = tn.decompose(
        to_library(matrix, library),
        shape,
        bonds=(4, 3),
        weights=to_library(moments, library),
        return_info=True,
    )
    plain = tn.decompose(matrix, shape, bonds=(4, 3)).to_matrix()
    whole, missed = damped(moments), matrix - to_numpy(mpo.to_matrix())
    norm = weighted_norm(matrix, whole)
    assert np.isclose(info.weighted_error, weighted_norm(missed, whole) / norm, rtol=1e-4)
    assert info.weighted_error < 0.9 * weighted_norm(matrix - plain, whole) / norm
    shared = tn.decompose_shared(
        matrix[None], shape, bonds=(4, 3), weights=moments, return_info=True
    )
    assert info.weighted_error < 1.02 * shared[1].weighted_errors[0]
    assert mpo.bond_dims == (4, 3)
    left = to_numpy(mpo.cores[0]).reshape(6, 4)
    np.testing.assert_allclose(left.conj().T @ left, np.eye(4), atol=1e-5)


@given(
    shapes(max_sites=4, max_size=300),
    st.sampled_from(KINDS),
    st.sampled_from(("float32", "float64", "complex128", "float16")),
    st.sampled_from(("max_bond", "rtol", "max_params", None)),
    libraries,
    st.sampled_from((0.0, 0.01, 1.0)),
)
def test_no_error_exceeds_its_bound_and_no_result_its_limits(
    shape, kind, dtype, limit, library, damping
):
    dtype = "float64" if library not in ("numpy", "torch") and dtype == "float16" else dtype
    kind = "gaussian" if dtype == "float16" else kind
    matrix = make_matrix(kind, shape.out_features, shape.in_features, dtype, 0)
    moments = moments_of(shape.in_features, "complex128" if "complex" in dtype else "float32")
    least = shape.num_params(1)
    limits = {"max_bond": 3, "rtol": 0.3, "max_params": least + 40, None: None}[limit]
    given_ = {} if limit is None else {limit: limits}
    mpo, info = tn.decompose(
        to_library(matrix, library),
        shape,
        weights=to_library(moments, library),
        damping=damping,
        return_info=True,
        **given_,
    )
    built = to_numpy(mpo.to_matrix()).astype(complex)
    assert to_numpy(mpo.cores[0]).dtype == matrix.dtype
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    eps = np.finfo(matrix.dtype).eps
    norm = dense_norm(matrix)
    assert dense_norm(matrix.astype(wide) - built) <= info.error_bound + 20 * eps * norm
    if limit == "rtol":
        assert info.weighted_error <= 0.3 + 200 * eps
    if limit == "max_params":
        assert mpo.num_params <= least + 40
    if limit == "max_bond":
        assert max(mpo.bond_dims, default=1) <= 3
    if limit is None:
        assert info.weighted_error <= 300 * eps


@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.3])
def test_the_tolerance_limits_the_weighted_error_and_saves_parameters(rtol):
    matrix, moments = gaussian(12, 12), moments_of(12)
    mpo, info = tn.decompose(matrix, SHAPE, rtol=rtol, weights=moments, return_info=True)
    assert info.weighted_error <= rtol + 1e-12
    if rtol == 0.3:
        assert mpo.num_params < tn.decompose(matrix, SHAPE, rtol=rtol).num_params


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [SHAPE, tn.MPOShape((12, 1), (1, 12))])
def test_extreme_scales_change_nothing(shape, scale):
    matrix, moments = gaussian(12, 12, dtype="float32"), moments_of(12, "float32")
    expected, found = (
        tn.decompose(
            matrix * np.float32(a), shape, max_bond=3, weights=moments * b, return_info=True
        )
        for a, b in ((1, np.float32(1)), (scale, np.float32(scale)))
    )
    assert np.isclose(found[1].weighted_error, expected[1].weighted_error, rtol=1e-4)
    assert np.isclose(found[1].error_bound / scale, expected[1].error_bound, rtol=1e-3)
    assert np.isclose(found[1].discarded[0] / scale, expected[1].discarded[0], rtol=1e-3)


def test_gradients_reach_the_matrix():
    matrix = torch.from_numpy(gaussian(12, 12)).requires_grad_()
    for shape in (SHAPE, tn.MPOShape((12, 1), (1, 12))):
        mpo = tn.decompose(matrix, shape, max_bond=3, weights=torch.from_numpy(moments_of(12)))
        (gradient,) = torch.autograd.grad(mpo.to_matrix().sum(), matrix)
        assert torch.isfinite(gradient).all()


def test_bad_weights_are_named():
    matrix, moments = gaussian(12, 10), moments_of(10)
    for arguments, message in (
        ({"weights": moments[None]}, r"weights must have shape \(10, 10\), got \(1, 10, 10\)"),
        ({"weights": moments[:9, :9]}, r"weights must have shape \(10, 10\), got \(9, 9\)"),
        ({"weights": moments, "damping": 2}, "damping must be in"),
        ({"weights": moments * np.nan}, "the weights contain NaN"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose(matrix, max_bond=2, **arguments)
    with pytest.raises(tn.InputError, match=r"the .* matrix contains NaN"):
        tn.decompose(matrix * np.nan, max_bond=2, weights=moments)
    with pytest.raises(tn.InputError, match=r"bonds=\(2,\) leave a weighted error of .* rtol=0.01"):
        tn.decompose(matrix, tn.MPOShape((12, 1), (1, 10)), bonds=(2,), rtol=0.01, weights=moments)
