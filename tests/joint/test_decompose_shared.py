"""Joint decompositions, against dense algebra."""

import warnings
from math import prod

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
from tnmoe.backends.protocol import EPSILON
from tnmoe.shapes import shared_bond_dims

SHAPE = tn.MPOShape((2, 3, 2), (3, 2, 2))
dtypes = st.sampled_from(("float32", "float64", "complex64", "complex128"))


def gaussian(*size, seed=0, dtype="float64"):
    numbers = np.random.default_rng(seed).standard_normal((2, *size))
    return (numbers[0] + (1j * numbers[1] if "complex" in dtype else 0)).astype(dtype)


def errors_of(matrices, shared):
    """The Frobenius norms of what all experts miss, in double precision."""
    wide = [to_numpy(each).astype(complex) for each in (matrices, chains_of(shared))]
    return [dense_norm(a - b) for a, b in zip(*wide, strict=True)]


def chains_of(shared):
    """The experts' matrices, contracted in double precision by NumPy."""
    built = []
    for number in range(shared.num_experts):
        product = np.ones((1, 1, 1))
        for core in map(to_numpy, shared.expert(number).cores):
            product = np.einsum("xyb,boia->xoyia", product, core)
            x, o, y, i, a = product.shape
            product = product.reshape(x * o, y * i, a)
        built.append(product[: shared.shape.out_features, : shared.shape.in_features, 0])
    return np.stack(built)


@st.composite
def tasks(draw):
    """Matrices of several kinds with sites to share and limits of every sort."""
    shape = draw(shapes(max_sites=4, max_size=400).filter(lambda shape: shape.sites > 1))
    experts, dtype = draw(st.integers(1, 4)), draw(dtypes)
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=experts, max_size=experts))
    size = shape.out_features, shape.in_features
    matrices = np.stack([make_matrix(kind, *size, dtype, seed) for seed, kind in enumerate(kinds)])
    owned = draw(st.sets(st.integers(0, shape.sites - 1), min_size=1))
    shared = sorted(set(range(shape.sites)) - owned)
    limit = draw(st.sampled_from((None, "max_bond", "bonds", "max_params")))
    limits = {}
    if limit == "max_bond":
        limits = {"max_bond": draw(st.integers(1, 8))}
    elif limit == "bonds":
        largest = shared_bond_dims(shape, owned, experts)
        wanted = [draw(st.integers(1, min(12, bond))) for bond in largest]
        limits = {"bonds": shared_bond_dims(shape, owned, experts, wanted)}
    elif limit == "max_params":
        fewest = sum(prod(core) for core in shape.core_shapes(1)) * experts
        limits = {"max_params": fewest + draw(st.integers(0, 500))}
    return matrices, shape, shared, limits


@given(tasks(), libraries)
def test_no_error_exceeds_its_bound_and_no_result_its_limits(task, library):
    matrices, shape, shared_sites, limits = task
    given_ = to_library(matrices, library)
    shared, info = tn.decompose_shared(
        given_, shape, shared_sites=shared_sites, max_sweeps=6, return_info=True, **limits
    )
    assert type(shared.center) is type(given_)
    assert to_numpy(shared.center).dtype == matrices.dtype
    assert shared.shared_sites == frozenset(shared_sites)
    assert shared.num_experts == len(matrices)
    assert shared.num_params <= limits.get("max_params", shared.num_params)
    assert limits.get("bonds", shared.bond_dims) == shared.bond_dims
    assert all(bond <= limits.get("max_bond", bond) for bond in shared.bond_dims)
    errors = errors_of(matrices, shared)
    assert all(error <= bound for error, bound in zip(errors, info.error_bounds, strict=True))
    assert dense_norm(np.array(errors)) <= info.error_bound * (1 + 1e-12)
    assert list(info.history) == sorted(info.history, reverse=True)
    if not limits:
        assert max(info.relative_errors) <= 2000 * EPSILON[str(matrices.dtype)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("bond", [1, 3, 7, 12, 20])
def test_two_sites_of_which_one_is_owned_reach_the_optimum(bond, dtype, library):
    # The oracle is the truncated SVD of all experts' rows (Eckart and Young).
    matrices = gaussian(4, 12, 10, dtype=dtype)
    matrices /= np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    shape = tn.MPOShape.split(12, 10, left=6, right=())
    _, info = tn.decompose_shared(
        to_library(matrices, library), shape, max_bond=bond, return_info=True
    )
    values = np.linalg.svd(matrices.reshape(4 * 6, 2 * 10), compute_uv=False)
    assert np.isclose(dense_norm(np.array(info.errors)), np.linalg.norm(values[bond:]), atol=1e-5)


@pytest.mark.parametrize("sites", ["center", "none", [0, 2]])
def test_a_single_expert_is_decomposed_alone(sites):
    matrices = gaussian(1, 12, 12)
    shared = tn.decompose_shared(matrices, SHAPE, max_bond=5, shared_sites=sites)
    alone = tn.decompose(matrices[0], SHAPE, max_bond=5)
    np.testing.assert_allclose(chains_of(shared)[0], alone.to_matrix(), atol=1e-12)


@pytest.mark.parametrize("sites", ["center", [0], [0, 2]])
def test_equal_experts_need_no_more_than_one(sites):
    matrices = np.stack([gaussian(12, 12)] * 3)
    _, info = tn.decompose_shared(
        matrices, SHAPE, bonds=SHAPE.bond_dims(), shared_sites=sites, return_info=True
    )
    assert max(info.relative_errors) < 1e-13


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("are_orthogonal", [True, False])
def test_experts_that_differ_in_auxiliary_cores_alone_are_recovered(are_orthogonal, dtype):
    shape, core = tn.MPOShape((4, 4, 4), (3, 4, 3)), gaussian(12, 4, 4, 12, seed=1, dtype=dtype)
    matrices = []
    for seed in range(4):
        sides = [np.eye(12) + 0.3 * gaussian(12, 12, seed=(seed, n), dtype=dtype) for n in (0, 1)]
        if are_orthogonal:
            sides = [np.linalg.qr(gaussian(12, 12, seed=(seed, n), dtype=dtype))[0] for n in (0, 1)]
        cores = [sides[0].reshape(1, 4, 3, 12), core, sides[1].reshape(12, 4, 3, 1)]
        matrices.append(tn.MPO(cores, shape).to_matrix() * 10.0**seed)
    _, info = tn.decompose_shared(
        np.stack(matrices), shape, max_bond=12, max_sweeps=300, tol=1e-14, return_info=True
    )
    assert max(info.relative_errors) < 1e-9


def test_the_error_falls_to_zero_between_sharing_everything_and_nothing():
    matrices = gaussian(3, 12, 12)
    errors = []
    for bond in (2, 4, 6, 8, 10, 12):
        shared, info = tn.decompose_shared(matrices, SHAPE, max_bond=bond, return_info=True)
        errors.append(max(info.relative_errors))
        assert max(shared.bond_dims) == bond
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 1e-13 < errors[-2]


def test_least_squares_are_better_than_what_they_start_from():
    own = gaussian(6, 12, 12)
    for part in (0.0, 0.5, 2.0):
        matrices = part * gaussian(12, 12, seed=1) + own
        shared, info = tn.decompose_shared(matrices, SHAPE, bonds=(4, 4), return_info=True)
        found = dense_norm(np.array(info.relative_errors))
        assert info.history[-1] <= info.history[0]
        mean = tn.decompose(matrices.mean(0), SHAPE, bonds=(4, 4))
        assert found < dense_norm(matrices - mean.to_matrix()) / dense_norm(matrices) * 6**0.5
        assert shared.num_params == 6 * (6 * 4 + 4 * 4) + 4 * 6 * 4


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("bonds", [(6, 4), None])
def test_experts_of_any_scale_count_alike(scale, bonds):
    matrices = gaussian(3, 12, 12)
    _, expected = tn.decompose_shared(matrices, SHAPE, bonds=bonds, return_info=True)
    scaled = matrices * np.array([scale, 1 / scale, 1.0])[:, None, None]
    _, info = tn.decompose_shared(scaled, SHAPE, bonds=bonds, return_info=True)
    np.testing.assert_allclose(info.relative_errors, expected.relative_errors, atol=1e-9)


def test_zeros_and_experts_of_rank_one_cost_the_others_nothing():
    matrices = np.stack([np.zeros((12, 12)), np.outer(np.arange(12.0), np.ones(12))])
    shared, info = tn.decompose_shared(matrices, SHAPE, rtol=1e-8, return_info=True)
    assert not chains_of(shared)[0].any()
    assert max(info.relative_errors) <= 1e-8
    assert max(shared.bond_dims) <= 2
    zeros, info = tn.decompose_shared(np.zeros((3, 12, 12)), SHAPE, max_bond=2, return_info=True)
    assert not chains_of(zeros).any()
    assert info.relative_errors == (0.0, 0.0, 0.0)


def test_a_report_of_many_experts_is_one_short_line():
    _, info = tn.decompose_shared(gaussian(64, 12, 12), SHAPE, max_bond=6, return_info=True)
    largest = max(info.relative_errors)
    assert repr(info) == (
        f"SharedInfo(experts=64, largest_relative_error={largest:.3g}, "
        f"converged={info.converged}, start={info.start!r})"
    )


def test_many_small_experts_and_half_precision():
    matrices = gaussian(64, 12, 12).astype("float16")
    shared, info = tn.decompose_shared(matrices, SHAPE, max_bond=6, return_info=True)
    assert shared.center.dtype == np.float16
    errors = errors_of(matrices, shared)
    assert all(error <= bound for error, bound in zip(errors, info.error_bounds, strict=True))


@pytest.mark.parametrize("sites", ["center", [0], [1, 2]])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.2, 0.7, 2.0])
def test_no_expert_misses_the_tolerance(rtol, sites):
    matrices = gaussian(4, 12, 12) + 2 * gaussian(12, 12, seed=3)
    matrices[1] *= 1e6
    shared, info = tn.decompose_shared(
        matrices, SHAPE, rtol=rtol, shared_sites=sites, return_info=True
    )
    assert max(info.relative_errors) <= rtol + 1e-12
    exact = tn.decompose_shared(matrices, SHAPE, shared_sites=sites)
    assert shared.num_params <= exact.num_params
    if rtol >= 0.7:
        assert shared.num_params < exact.num_params


@pytest.mark.parametrize("sites", ["center", [0]])
@pytest.mark.parametrize("limit", [{"max_bond": 1}, {"max_params": 150}])
def test_a_warning_names_the_experts_that_miss_the_tolerance(limit, sites):
    matrices = gaussian(3, 12, 12)
    matrices[1] = 0
    with pytest.warns(UserWarning, match=r"rtol=0.01 .* experts \[0, 2\] are up to 0\.\d+"):
        tn.decompose_shared(matrices, SHAPE, rtol=0.01, shared_sites=sites, **limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tn.decompose_shared(matrices, SHAPE, rtol=1.1, shared_sites=sites, **limit)


@pytest.mark.parametrize("max_params", [120, 200, 500, 5000])
@pytest.mark.parametrize("sites", ["center", [0], "none"])
def test_the_number_of_parameters_is_kept_and_used(sites, max_params):
    matrices = gaussian(3, 12, 12)
    shared, info = tn.decompose_shared(
        matrices, SHAPE, max_params=max_params, shared_sites=sites, return_info=True
    )
    assert shared.num_params <= max_params
    if max_params == 5000:
        assert max(info.relative_errors) < 1e-13
    else:
        assert shared.num_params > 0.5 * max_params


def with_base(experts, rank, noise=0.0, seed=0):
    """Matrices that are a common one plus one of low rank for every expert."""
    left, right = gaussian(experts, 12, rank, seed=seed), gaussian(experts, rank, 15, seed=seed + 1)
    own = gaussian(experts, 12, 15, seed=seed + 3)
    return gaussian(12, 15, seed=seed + 2) + left @ right / 4 + noise * own


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_a_base_and_matrices_of_low_rank_are_found(dtype, library):
    matrices = with_base(6, 2).astype(dtype)
    shared, info = tn.decompose_shared(
        to_library(matrices, library),
        residual=True,
        max_bond=2,
        max_sweeps=400,
        tol=1e-9,
        return_info=True,
    )
    assert shared.base is not None
    assert shared.shape == tn.MPOShape((12, 1), (1, 15))
    assert shared.num_params == 12 * 15 + 6 * 2 * (12 + 15)
    built = to_numpy(shared.to_matrices())
    errors = [dense_norm(a - b) for a, b in zip(matrices, built, strict=True)]
    assert all(a <= b + 1e-5 for a, b in zip(errors, info.error_bounds, strict=True))
    assert max(info.relative_errors) < 1e-3
    assert list(info.history) == sorted(info.history, reverse=True)


def test_a_fitted_base_is_better_than_the_mean():
    matrices = with_base(5, 4, noise=0.05)
    matrices[0] *= 3
    norms = np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    mean = np.average(matrices, axis=0, weights=norms[:, 0, 0] ** -2)
    values = np.linalg.svd((matrices - mean) / norms, compute_uv=False)
    for bond in (1, 3, 5):
        _, info = tn.decompose_shared(matrices, residual=True, max_bond=bond, return_info=True)
        found, of_mean = dense_norm(np.array(info.relative_errors)), values[:, bond:]
        assert found < np.linalg.norm(of_mean)
        assert np.isclose(info.history[0] * 5**0.5, np.linalg.norm(of_mean))


@pytest.mark.parametrize("shape", [None, tn.MPOShape((3, 4, 1, 1), (1, 1, 3, 5))])
@pytest.mark.parametrize("sites", [None, [0]])
def test_limits_hold_with_a_base(shape, sites):
    matrices = with_base(4, 3, noise=0.1)
    given = {"residual": True, "shared_sites": sites, "max_sweeps": 8, "return_info": True}
    shared, info = tn.decompose_shared(matrices, shape, rtol=0.2, **given)
    assert max(info.relative_errors) <= 0.2
    exact, _ = tn.decompose_shared(matrices, shape, **given)
    assert shared.num_params < exact.num_params
    assert exact.base.num_params == 180
    shared, info = tn.decompose_shared(matrices, shape, max_params=500, **given)
    assert 180 < shared.num_params <= 500
    built = shared.to_matrices()
    errors = [dense_norm(a - b) for a, b in zip(matrices, built, strict=True)]
    assert all(a <= b for a, b in zip(errors, info.error_bounds, strict=True))
    with pytest.raises(tn.InputError, match="max_params=181 is too few"):
        tn.decompose_shared(matrices, shape, max_params=181, **given)


def test_equal_experts_and_zeros_need_a_base_alone():
    equal = np.stack([gaussian(12, 15)] * 3)
    _, info = tn.decompose_shared(equal, residual=True, max_bond=1, return_info=True)
    assert max(info.relative_errors) < 1e-14
    zeros, info = tn.decompose_shared(0 * equal, residual=True, max_bond=1, return_info=True)
    assert not zeros.to_matrices().any()
    assert info.relative_errors == (0.0, 0.0, 0.0)
    equal[1] = 0
    _, info = tn.decompose_shared(equal, residual=True, max_bond=1, return_info=True)
    assert info.relative_errors[1] == np.inf
    assert info.errors[1] > 0


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("sites", ["none", [0], [1]])
def test_zeros_beside_a_base_do_not_feel_the_scale_of_the_others(sites, scale):
    matrices = with_base(4, 2, noise=0.1).astype("float32")
    matrices[2] = 0
    given_ = {"residual": True, "max_bond": 3, "shared_sites": sites, "max_sweeps": 4}
    shape = tn.MPOShape((4, 3, 1), (1, 3, 5))
    expected = tn.decompose_shared(matrices, shape, **given_).to_matrices()
    found = tn.decompose_shared(matrices * np.float32(scale), shape, **given_).to_matrices()
    np.testing.assert_allclose(found / scale, expected, atol=1e-3 * np.abs(expected).max())


def moments_of(experts, size, seed=0, dtype="float64"):
    """Second moments of inputs that are strong in a few directions, other ones for every expert."""
    inputs = gaussian(experts, size, 4 * size, seed=seed, dtype=dtype)
    inputs = inputs * np.linspace(3, 0.05, size)[:, None]
    turns = np.linalg.qr(gaussian(experts, size, size, seed=seed + 1, dtype=dtype))[0]
    inputs = turns @ inputs
    return inputs @ inputs.conj().swapaxes(1, 2) / (4 * size)


def damped(moments, damping=0.01):
    size = moments.shape[-1]
    means = np.trace(moments, axis1=-2, axis2=-1).real[..., None, None] / size
    return (1 - damping) * moments / means + damping * np.eye(size)


def weighted_norms(matrices, moments):
    squares = np.einsum("eoi,eij,eoj->e", matrices, moments, matrices.conj()).real
    return np.sqrt(squares)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_weighted_low_rank_matrices_reach_the_optimum(dtype, library):
    # The oracle is the truncated SVD of W · S^½, expert by expert.
    matrices, moments = gaussian(2, 12, 10, dtype=dtype), moments_of(2, 10, dtype=dtype)
    _, info = tn.decompose_shared(
        to_library(matrices, library),
        tn.MPOShape((12, 1), (1, 10)),
        max_bond=3,
        shared_sites="none",
        weights=to_library(moments, library),
        max_sweeps=200,
        tol=1e-9,
        return_info=True,
    )
    roots = np.linalg.cholesky(damped(moments))
    values = np.linalg.svd(matrices @ roots, compute_uv=False)
    best = np.linalg.norm(values[:, 3:], axis=1) / np.linalg.norm(values, axis=1)
    np.testing.assert_allclose(info.weighted_errors, best, rtol=2e-3)


def test_weighted_joint_chains_of_two_sites_reach_the_optimum():
    # With moments that all experts have in common the oracle is the SVD of all rows · S^½.
    matrices, moments = gaussian(4, 12, 10), moments_of(1, 10)[0]
    shape, root = tn.MPOShape.split(12, 10, left=6, right=()), np.linalg.cholesky(damped(moments))
    sizes = np.linalg.norm(matrices @ root, axis=(1, 2), keepdims=True)
    rows = (matrices / sizes).reshape(4 * 6, 2, 10) @ root
    values = np.linalg.svd(rows.reshape(4 * 6, 20), compute_uv=False)
    _, info = tn.decompose_shared(
        matrices, shape, max_bond=7, weights=moments, max_sweeps=300, tol=1e-10, return_info=True
    )
    assert np.isclose(
        dense_norm(np.array(info.weighted_errors)), np.linalg.norm(values[7:]), rtol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_common_weights_need_one_sweep_where_input_legs_share_a_site(library, dtype, monkeypatch):
    # The oracle is the truncated SVD of all experts' whitened rows.
    monkeypatch.setattr("tnmoe.joint.finder.fit_shared", None)  # least squares would fail
    matrices, moments = gaussian(4, 12, 10, dtype=dtype), moments_of(1, 10, dtype=dtype)[0]
    shape, root = tn.MPOShape((6, 2), (1, 10)), np.linalg.cholesky(damped(moments))
    sizes = np.linalg.norm(matrices @ root, axis=(1, 2), keepdims=True)
    importance = np.array([3.0, 1.0, 1.0, 2.0])
    rows = (matrices / sizes * np.sqrt(importance)[:, None, None]).reshape(24, 2, 10) @ root
    values = np.linalg.svd(rows.reshape(24, 20), compute_uv=False)
    given_ = to_library(matrices, library), shape
    rest = {"weights": to_library(moments, library), "return_info": True}
    _, info = tn.decompose_shared(*given_, max_bond=7, importance=importance, **rest)
    found = np.sqrt(importance) * info.weighted_errors
    assert np.isclose(np.linalg.norm(found), np.linalg.norm(values[7:]), rtol=1e-5)
    assert info.history == ()
    _, info = tn.decompose_shared(*given_, rtol=0.3, **rest)
    assert 0.2 < max(info.weighted_errors) <= 0.3


def test_weights_of_every_expert_need_no_least_squares_where_it_owns_the_input_legs(monkeypatch):
    monkeypatch.setattr("tnmoe.joint.finder.fit_shared", None)
    matrices, moments = gaussian(3, 12, 10), moments_of(3, 10)
    shape = tn.MPOShape((12, 1), (1, 10))
    given_ = {"weights": moments, "max_bond": 3, "return_info": True}
    _, info = tn.decompose_shared(matrices, shape, shared_sites="none", **given_)
    roots = np.linalg.cholesky(damped(moments))
    values = np.linalg.svd(matrices @ roots, compute_uv=False)
    best = np.linalg.norm(values[:, 3:], axis=1) / np.linalg.norm(values, axis=1)
    np.testing.assert_allclose(info.weighted_errors, best, rtol=1e-10)
    shared, info = tn.decompose_shared(matrices, residual=True, **given_)
    rest = np.linalg.svd((matrices - shared.base.to_matrix()) @ roots, compute_uv=False)
    best = np.linalg.norm(rest[:, 3:], axis=1) / np.linalg.norm(values, axis=1)
    np.testing.assert_allclose(info.weighted_errors, best, rtol=1e-10)
    assert list(info.history) == sorted(info.history, reverse=True)
    # A shared site cannot take the roots of every expert.
    with pytest.raises(TypeError):
        tn.decompose_shared(matrices, shape, shared_sites=[1], **given_)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("is_common", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_weights_lower_the_weighted_error(dtype, is_common, residual):
    matrices = gaussian(3, 12, 12, dtype=dtype) + gaussian(12, 12, seed=5, dtype=dtype)
    moments = moments_of(1 if is_common else 3, 12, dtype=dtype)
    given = {"shape": SHAPE, "bonds": (4, 3), "residual": residual, "return_info": True}
    plain, plain_info = tn.decompose_shared(matrices, **given)
    weights = moments[0] if is_common else moments
    shared, info = tn.decompose_shared(matrices, weights=weights, **given)
    whole = damped(moments).repeat(3, 0) if is_common else damped(moments)
    norms = weighted_norms(matrices, whole)
    errors = weighted_norms(matrices - shared.to_matrices(), whole) / norms
    np.testing.assert_allclose(info.weighted_errors, errors, rtol=1e-9)
    of_plain = weighted_norms(matrices - plain.to_matrices(), whole) / norms
    assert dense_norm(errors) < 0.9 * dense_norm(of_plain)
    assert dense_norm(np.array(plain_info.errors)) < dense_norm(np.array(info.errors))
    assert list(info.history) == sorted(info.history, reverse=True)
    assert plain_info.weighted_errors is None


def test_moments_without_a_preference_change_nothing():
    matrices = gaussian(3, 12, 12)
    _, expected = tn.decompose_shared(matrices, SHAPE, bonds=(4, 4), return_info=True)
    for weights, damping in (
        (np.eye(12), 0.01),
        (np.zeros((12, 12)), 0.01),
        (moments_of(3, 12), 1.0),
        (np.stack([np.eye(12), 1e-12 * np.eye(12), np.zeros((12, 12))]), 0.01),
    ):
        _, info = tn.decompose_shared(
            matrices, SHAPE, bonds=(4, 4), weights=weights, damping=damping, return_info=True
        )
        np.testing.assert_allclose(info.weighted_errors, info.relative_errors)
        found, size = (
            dense_norm(np.array(info.relative_errors)),
            dense_norm(np.array(expected.relative_errors)),
        )
        assert found < size + 2e-3


@pytest.mark.parametrize("sites", ["center", [0], "none"])
def test_the_tolerance_limits_weighted_errors(sites):
    matrices, moments = gaussian(3, 12, 12), moments_of(3, 12)
    given = {"shared_sites": sites, "rtol": 0.4, "return_info": True, "max_sweeps": 10}
    plain, _ = tn.decompose_shared(matrices, SHAPE, **given)
    shared, info = tn.decompose_shared(matrices, SHAPE, weights=moments, **given)
    assert max(info.weighted_errors) <= 0.4
    assert shared.num_params < plain.num_params


@pytest.mark.parametrize("scale", [1e-37, 1e37])
def test_the_scale_of_moments_does_not_matter(scale):
    matrices, moments = gaussian(3, 12, 12, dtype="float32"), moments_of(3, 12, dtype="float32")
    expected, found = (
        tn.decompose_shared(
            matrices, SHAPE, bonds=(4, 3), weights=weights, max_sweeps=5, return_info=True
        )[1].weighted_errors
        for weights in (moments, (moments * np.float32(scale)))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_single_matrix_keeps_its_outputs():
    matrix, moments = gaussian(12, 12), moments_of(1, 12)[0]
    shared = tn.decompose_shared(matrix[None], SHAPE, bonds=(4, 3), weights=moments)
    found, plain = shared.expert(0), tn.decompose(matrix, SHAPE, bonds=(4, 3))
    errors = [
        weighted_norms((matrix - each.to_matrix())[None], damped(moments)[None])[0]
        for each in (found, plain)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_bad_weights_are_named():
    matrices, moments = gaussian(3, 12, 10), moments_of(3, 10)
    for weights, message in (
        (moments[:2], r"weights must have shape \(3, 10, 10\) or \(10, 10\), got \(2, 10, 10\)"),
        (moments + np.triu(moments), "Hermitian"),
        (-moments, "positive"),
        (moments * np.nan, "the weights contain NaN"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose_shared(matrices, max_bond=2, weights=weights)
    with pytest.raises(tn.InputError, match="weights of real matrices must be real, got complex"):
        tn.decompose_shared(matrices, max_bond=2, weights=moments + 0j)
    with pytest.raises(tn.InputError, match="damping"):
        tn.decompose_shared(matrices, max_bond=2, weights=moments, damping=2)
    with pytest.raises(TypeError, match="weights must be an array of numpy"):
        tn.decompose_shared(matrices, max_bond=2, weights=torch.from_numpy(moments))


IMPORTANCES = [(4.0, 1.0, 0.25, 2.0), (1e200, 1e200, 1e200, 0.0), (0, 0, 1e-3, 0)]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bond", [3, 11])
def test_importances_reach_the_optimum_of_two_sites(bond, library, dtype, importance):
    # The oracle is the truncated SVD of all experts' rows, every expert times the root of its own.
    matrices = gaussian(4, 12, 10, dtype=dtype)
    shape = tn.MPOShape.split(12, 10, left=6, right=())
    scales = np.array([1e15, 1.0, 1e-15, 3.0])[:, None, None]
    shared, info = tn.decompose_shared(
        to_library((matrices * scales).astype(dtype), library),
        shape,
        max_bond=bond,
        importance=importance,
        return_info=True,
    )
    shares = np.array(importance) / max(importance)
    sizes = np.linalg.norm(matrices, axis=(1, 2))
    rows = (matrices * (np.sqrt(shares) / sizes)[:, None, None]).reshape(24, 20)
    values = np.linalg.svd(rows, compute_uv=False)
    found = np.linalg.norm(np.sqrt(shares) * info.relative_errors)
    # What an expert of importance 0 may move.
    slack = 4 * np.sqrt(EPSILON[dtype])
    assert np.isclose(found, np.linalg.norm(values[bond:]), atol=slack, rtol=1e-5)
    # Every owned core is the projection of its matrix onto the rows of the shared one.
    common = np.linalg.svd(to_numpy(shared.center).reshape(bond, 20), full_matrices=False)[2]
    for matrix, error in zip(matrices.reshape(4, 6, 20), info.relative_errors, strict=True):
        left = matrix - matrix @ common.conj().T @ common
        assert np.isclose(error, np.linalg.norm(left) / np.linalg.norm(matrix), atol=1e-5)


def test_equal_importances_change_nothing():
    matrices = gaussian(3, 12, 12)
    for case in ({}, {"residual": True}, {"shared_sites": [0]}, {"weights": np.eye(12)}):
        settings = {"shape": SHAPE, "bonds": (4, 4), "max_sweeps": 4, **case}
        expected = tn.decompose_shared(matrices, **settings)
        for importance in ((7.0, 7.0, 7.0), np.ones(3), torch.ones(3)):
            shared = tn.decompose_shared(matrices, importance=importance, **settings)
            for core, other in zip(shared.cores, expected.cores, strict=True):
                np.testing.assert_array_equal(core, other)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("sites", ["center", [0], [1, 2]])
def test_an_important_expert_is_nearer_and_the_sum_smaller(sites, with_weights, residual):
    matrices = gaussian(4, 12, 12) + gaussian(12, 12, seed=8)
    importance = np.array([9.0, 1.0, 0.0, 1.0])
    given = {"shape": SHAPE, "bonds": (4, 3), "shared_sites": sites, "residual": residual}
    given |= {"weights": moments_of(4, 12) if with_weights else None, "return_info": True}
    given |= {"max_sweeps": 8}
    _, alike = tn.decompose_shared(matrices, **given)
    _, info = tn.decompose_shared(matrices, importance=importance, **given)
    sums = [importance @ np.square(each.limited_errors) for each in (info, alike)]
    assert sums[0] < sums[1]
    assert info.limited_errors[0] < alike.limited_errors[0]
    assert max(info.limited_errors) < 1
    assert list(info.history) == sorted(info.history, reverse=True)
    if info.history:
        assert np.isclose(info.history[-1], np.sqrt(sums[0] / importance.sum()), atol=1e-6)


def test_the_base_is_the_mean_that_importances_weigh():
    matrices = with_base(5, 4, noise=0.05)
    norms = np.linalg.norm(matrices, axis=(1, 2))
    importance = np.array([1.0, 5.0, 2.0, 0.0, 1.0])
    shared, info = tn.decompose_shared(
        matrices, residual=True, max_bond=2, importance=importance, max_sweeps=1, return_info=True
    )
    mean = np.average(matrices, axis=0, weights=importance / norms**2)
    np.testing.assert_allclose(shared.base.to_matrix(), mean, atol=1e-6)
    values = np.linalg.svd((matrices - mean) / norms[:, None, None], compute_uv=False)
    np.testing.assert_allclose(
        info.relative_errors, np.linalg.norm(values[:, 2:], axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("sites", ["center", [0], [1, 2], "none"])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.5])
def test_the_tolerance_limits_experts_of_no_importance(rtol, sites, residual):
    matrices = gaussian(4, 12, 12) * np.array([1e20, 1e-20, 1.0, 0.0])[:, None, None]
    if residual:
        matrices = gaussian(4, 12, 12) + gaussian(12, 12, seed=8)
    given = {"shared_sites": sites, "residual": residual, "importance": (1, 0, 0, 1e-9)}
    given |= {"return_info": True, "max_sweeps": 8}
    _, info = tn.decompose_shared(matrices, SHAPE, rtol=rtol, **given)
    assert max(info.relative_errors) <= rtol + 1e-12
    _, info = tn.decompose_shared(matrices, SHAPE, **given)
    assert max(info.relative_errors) <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zeros_may_be_all_that_matters(dtype):
    matrices = gaussian(3, 12, 12).astype(dtype)
    matrices[1] = 0
    for sites in ("center", [0], [1, 2]):
        shared, info = tn.decompose_shared(
            matrices,
            SHAPE,
            max_bond=4,
            shared_sites=sites,
            importance=[0, 1, 0],
            return_info=True,
        )
        assert not chains_of(shared)[1].any()
        assert max(info.relative_errors) < 1


def test_bad_importances_are_named():
    matrices = gaussian(3, 12, 12)
    for importance, message in (
        ((1, 2), r"importance must hold one number for each of 3 experts, got \(1, 2\)"),
        (2.0, "importance must hold one number for each of 3 experts, got 2.0"),
        ((1, -1, 1), r"every importance must be in \[0, inf\), got -1"),
        ((1, np.nan, 1), "every importance must be in"),
        ((1, np.inf, 1), "every importance must be in"),
        ((0, 0, 0), r"importance must hold a positive number, got \(0, 0, 0\)"),
        (np.ones((3, 1)), "every importance must be in"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose_shared(matrices, max_bond=2, importance=importance)


def test_gradients_reach_the_matrices():
    matrices = torch.from_numpy(gaussian(3, 12, 12)).requires_grad_()
    shape = tn.MPOShape.split(12, 12, left=4, right=())
    tn.decompose_shared(matrices, shape, max_bond=3).center.sum().backward()
    assert torch.isfinite(matrices.grad).all()


def test_bad_input_is_named():
    matrices = gaussian(3, 12, 12)
    for arguments, message in (
        ({"rtol": -1}, "rtol must be"),
        ({"max_params": 3}, r"max_params=3 is too few for 3 experts of .* have 36 parameters"),
        ({"bonds": (3,)}, r"one value per bond: got \(3,\) for 2 bonds"),
        (
            {"bonds": (19, 4)},
            r"bonds=\(19, 4\) do not fit 3 experts .* largest that fit .*\(18, 4\)",
        ),
        ({"bonds": (4, 4), "max_bond": 3}, r"bonds=\(4, 4\) exceed max_bond=3"),
        ({"bonds": (4, 4), "max_params": 99}, r"bonds=\(4, 4\) have \d+ parameters, more than"),
        ({"shared_sites": [0, 1, 2]}, "share all 3 sites"),
        ({"shared_sites": "ends"}, "shared_sites must be one of"),
        ({"residual": "yes"}, "residual"),
        ({"method": "lu"}, "method"),
        ({"max_sweeps": 0}, "max_sweeps"),
        ({"tol": -1}, "tol"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose_shared(matrices, SHAPE, **arguments)
    with pytest.raises(tn.InputError, match=r"a batch of matrices .* of shape \(12, 12\)"):
        tn.decompose_shared(matrices[0], SHAPE)
    matrices[2, 3, 4] = np.nan
    with pytest.raises(tn.InputError, match="the matrices contain NaN or infinity"):
        tn.decompose_shared(matrices, SHAPE)
    with pytest.raises(TypeError, match="shape must be an MPOShape"):
        tn.decompose_shared(matrices, (12, 12))
