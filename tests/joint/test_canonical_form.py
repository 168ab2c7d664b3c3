"""Joint decompositions in canonical form, against dense algebra."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.joint.test_decompose_shared import chains_of, damped, errors_of, gaussian, moments_of
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

SHAPE = tn.MPOShape((4, 4, 4), (3, 4, 3))


def isometry_errors(shared):
    """How far the cores of every expert are from isometries towards the centre."""
    found = []
    for number in range(shared.num_experts):
        for site, core in enumerate(map(to_numpy, shared.expert(number).cores)):
            if site < shared.center_site:
                matrix = core.reshape(-1, core.shape[-1])
                found.append(np.abs(matrix.conj().T @ matrix - np.eye(core.shape[-1])).max())
            elif site > shared.center_site:
                matrix = core.reshape(core.shape[0], -1)
                found.append(np.abs(matrix @ matrix.conj().T - np.eye(core.shape[0])).max())
    return max(found)


def of_the_form(experts=4, dtype="float64", sizes=(1.0,) * 4):
    """Matrices that have a central core in common, between isometries of their own."""
    core = gaussian(12, 4, 4, 12, seed=1, dtype=dtype)
    matrices = []
    for seed in range(experts):
        sides = [np.linalg.qr(gaussian(12, 12, seed=(seed, n), dtype=dtype))[0] for n in (0, 1)]
        cores = [sides[0].reshape(1, 4, 3, 12), core, sides[1].reshape(12, 4, 3, 1)]
        matrices.append(tn.MPO(cores, SHAPE).to_matrix() * sizes[seed])
    return np.stack(matrices)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_experts_of_the_form_are_recovered(dtype, library):
    matrices = of_the_form(dtype=dtype) * 1e10
    shared, info = tn.decompose_shared(
        to_library(matrices, library),
        SHAPE,
        form="canonical",
        max_sweeps=400,
        tol=1e-14,
        return_info=True,
    )
    assert max(info.relative_errors) < (1e-4 if dtype == "float32" else 1e-9)
    assert isometry_errors(shared) < (1e-5 if dtype == "float32" else 1e-12)
    norms = [np.linalg.norm(to_numpy(shared.center)), np.linalg.norm(matrices[0])]
    assert np.isclose(*norms, rtol=1e-4)
    assert list(info.history) == sorted(info.history, reverse=True)


@st.composite
def tasks(draw):
    shape = draw(shapes(max_sites=4, max_size=300).filter(lambda shape: shape.sites > 1))
    experts, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(("float32", "complex128")))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=experts, max_size=experts))
    size = shape.out_features, shape.in_features
    matrices = np.stack([make_matrix(kind, *size, dtype, seed) for seed, kind in enumerate(kinds)])
    owned = draw(st.sets(st.integers(0, shape.sites - 1), min_size=1))
    shared = sorted(set(range(shape.sites)) - owned)
    center_site = draw(st.integers(0, shape.sites - 1))
    return matrices, shape, shared, center_site


@given(tasks(), libraries, st.sampled_from((None, 1, 3)), st.booleans())
def test_every_chain_is_canonical_and_no_error_exceeds_its_bound(task, library, bond, residual):
    matrices, shape, shared_sites, center_site = task
    shared, info = tn.decompose_shared(
        to_library(matrices, library),
        shape,
        shared_sites=shared_sites,
        center_site=center_site,
        residual=residual,
        form="canonical",
        max_bond=bond,
        max_sweeps=4,
        return_info=True,
    )
    eps = EPSILON[str(matrices.dtype)]
    assert isometry_errors(shared) < 100 * eps
    if set(shared_sites) != set(range(shape.sites)) - {center_site}:
        assert all(a <= b for a, b in zip(shared.bond_dims, shape.bond_dims(bond), strict=True))
    for before, after in pairwise(info.history):
        assert after <= before
    if not residual:
        errors = errors_of(matrices, shared)
        assert all(error <= bound for error, bound in zip(errors, info.error_bounds, strict=True))


@pytest.mark.parametrize("center_site", [0, 1, 2])
@pytest.mark.parametrize("sites", ["center", [0, 2], [0]])
def test_a_single_expert_is_decomposed_alone(sites, center_site):
    matrices = gaussian(1, 64, 36) * 1e5
    given_ = {"max_bond": 5, "center_site": center_site}
    shared = tn.decompose_shared(matrices, SHAPE, shared_sites=sites, form="canonical", **given_)
    alone = tn.decompose(matrices[0], SHAPE, **given_)
    np.testing.assert_allclose(chains_of(shared)[0], alone.to_matrix(), atol=1e-7)
    assert isometry_errors(shared) < 1e-12


@pytest.mark.parametrize("sites", ["center", [0, 1], [0]])
def test_the_form_costs_little_where_norms_are_alike(sites):
    matrices = gaussian(4, 64, 36) + 2 * gaussian(64, 36, seed=9)
    errors = []
    for form in ("free", "canonical"):
        shared, info = tn.decompose_shared(
            matrices, SHAPE, bonds=(6, 6), shared_sites=sites, form=form, return_info=True
        )
        errors.append(dense_norm(np.array(info.relative_errors)))
        assert shared.bond_dims == (6, 6)
    assert 0.98 * errors[0] < errors[1] < 1.2 * errors[0]


def test_no_core_beside_the_others_could_be_better():
    # Random isometries near the one that was found.
    matrices = gaussian(3, 64, 36) + gaussian(64, 36, seed=9)
    shared, info = tn.decompose_shared(
        matrices, SHAPE, bonds=(6, 6), form="canonical", max_sweeps=300, tol=0, return_info=True
    )
    best = np.square(info.relative_errors).sum()
    rng = np.random.default_rng(0)
    for _ in range(20):
        cores = list(shared.cores)
        turned = cores[0].reshape(3, 12, 6) + 1e-2 * rng.normal(size=(3, 12, 6))
        cores[0] = np.linalg.qr(turned)[0].reshape(cores[0].shape)
        signs = np.sign(np.einsum("eia,eia->ea", cores[0].reshape(3, 12, 6), turned))
        cores[0] = cores[0] * signs[:, None, None, None, :]
        missed = matrices - tn.SharedMPO(cores, SHAPE, 1).to_matrices()
        relative = np.linalg.norm(missed, axis=(1, 2)) / np.linalg.norm(matrices, axis=(1, 2))
        assert np.square(relative).sum() > best


def test_a_shared_centre_has_one_norm_and_an_owned_one_many():
    sizes = (1.0, 3.0, 1.0, 1.0)
    matrices = of_the_form(sizes=sizes)
    given_ = {"form": "canonical", "max_sweeps": 100, "return_info": True}
    _, info = tn.decompose_shared(matrices, SHAPE, **given_)
    assert max(info.relative_errors) > (3 - 1) / (3 + 1)
    _, info = tn.decompose_shared(matrices, SHAPE, importance=(0, 1, 0, 0), **given_)
    assert info.relative_errors[1] < 1e-3
    scales = np.array([1e20, 1e-20, 0.0, 1.0])[:, None, None]
    shared, info = tn.decompose_shared(matrices * scales, SHAPE, shared_sites=[0], **given_)
    assert not chains_of(shared)[2].any()
    alike = tn.decompose_shared(matrices, SHAPE, shared_sites=[0], **given_)[1].relative_errors
    assert max(info.relative_errors) < 1.1 * max(alike) + 1e-12
    assert isometry_errors(shared) < 1e-12


@pytest.mark.parametrize("scales", [(1e20, 1e-20, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
def test_scales_that_no_common_norm_fits_stay_finite(scales):
    matrices = gaussian(4, 64, 36) * np.array(scales)[:, None, None]
    shared, info = tn.decompose_shared(
        matrices, SHAPE, bonds=(5, 5), form="canonical", return_info=True
    )
    assert all(np.isfinite(core).all() for core in shared.cores)
    assert isometry_errors(shared) < 1e-12
    if not any(scales):
        assert info.relative_errors == (0.0,) * 4
    else:
        assert np.sum(np.square(info.relative_errors[:3])) <= 3 + 1e-9


def test_the_tolerance_counts_and_a_warning_names_those_that_miss_it():
    matrices = of_the_form() + 0.01 * gaussian(4, 64, 36)
    shared, info = tn.decompose_shared(
        matrices, SHAPE, form="canonical", rtol=0.6, return_info=True
    )
    assert max(info.relative_errors) <= 0.6
    assert shared.num_params < tn.decompose_shared(matrices, SHAPE, form="canonical").num_params
    with pytest.warns(UserWarning, match=r"rtol=1e-06 needs more than the other limits allow"):
        tn.decompose_shared(gaussian(3, 64, 36), SHAPE, form="canonical", rtol=1e-6, max_sweeps=3)


@pytest.mark.parametrize("is_common", [False, True])
def test_weights_meet_input_legs_at_the_centre(is_common):
    shape = tn.MPOShape((4, 3, 1), (1, 10, 1), 12, 10)
    matrices, moments = gaussian(3, 12, 10), moments_of(1 if is_common else 3, 10)
    given_ = {"form": "canonical", "bonds": (3, 1), "center_site": 1, "return_info": True}
    weights = moments[0] if is_common else moments
    sites = [1] if is_common else [0]
    shared, info = tn.decompose_shared(
        matrices, shape, weights=weights, shared_sites=sites, **given_
    )
    assert isometry_errors(shared) < 1e-12
    missed, whole = matrices - shared.to_matrices(), damped(moments).repeat(3 // len(moments), 0)
    sizes = [np.sqrt(np.einsum("eoi,eij,eoj->e", each, whole, each)) for each in (missed, matrices)]
    np.testing.assert_allclose(info.weighted_errors, sizes[0] / sizes[1])
    for bad in ({"shape": SHAPE}, {"shape": shape, "weights": moments_of(3, 10)}):
        arguments = {"weights": np.eye(36), "form": "canonical", **bad}
        size = (3, bad["shape"].out_features, bad["shape"].in_features)
        with pytest.raises(tn.InputError, match="takes weights only if all input legs stand at"):
            tn.decompose_shared(gaussian(*size), **arguments)


def test_gradients_are_finite():
    matrices = torch.from_numpy(gaussian(3, 64, 36)).requires_grad_()
    shared = tn.decompose_shared(matrices, SHAPE, bonds=(4, 4), form="canonical", max_sweeps=4)
    shared.to_matrices().sum().backward()
    assert torch.isfinite(matrices.grad).all()


def test_bad_forms_and_bonds_are_named():
    matrices = gaussian(3, 64, 36)
    with pytest.raises(tn.InputError, match="form must be one of free, canonical, got 'rigid'"):
        tn.decompose_shared(matrices, SHAPE, form="rigid")
    with pytest.raises(tn.InputError, match=r"bonds=\(20, 12\) do not fit .* are \(12, 12\)"):
        tn.decompose_shared(matrices, SHAPE, form="canonical", bonds=(20, 12))
