"""compress: never further off than its bound, never a larger bond, exact ranks by default."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    LIBRARIES,
    dense_norm,
    libraries,
    make_matrix,
    matrices,
    rounding,
    to_library,
    to_numpy,
)
from tests.test_decompose import assert_canonical

max_bonds = st.one_of(st.none(), st.integers(1, 6))
rtols = st.one_of(st.none(), st.sampled_from((0.0, 1e-6, 1e-2, 0.3)))


def chain(mpo):
    """The whole chain as a matrix, padding included."""
    return to_numpy(tn.MPO(mpo.cores).to_matrix())


def scrambled(mpo, seed=0):
    """The same operator with its gauge lost and its bonds grown by zeros in a random basis."""
    rng = np.random.default_rng(seed)
    cores = [to_numpy(core).copy() for core in mpo.cores]
    for bond in range(len(cores) - 1):
        size = cores[bond].shape[-1]
        basis = np.linalg.qr(rng.standard_normal((size + 2, size + 2)))[0].astype(cores[0].dtype)
        cores[bond] = cores[bond] @ basis[:size]
        following = basis[:, :size].reshape(size + 2, size) * 0 + basis[:size].T
        cores[bond + 1] = np.tensordot(following, cores[bond + 1], 1)
    like = mpo.cores[0]
    library = "torch" if isinstance(like, torch.Tensor) else "numpy"
    return tn.MPO([to_library(core, library) for core in cores], mpo.shape)


@given(matrices, libraries, max_bonds, rtols, st.one_of(st.none(), st.integers(0, 3)))
def test_compress_obeys_its_bound_its_limits_and_its_centre(
    case, library, max_bond, rtol, center_site
):
    shape, matrix = case
    center_site = None if center_site is None else min(center_site, shape.sites - 1)
    mpo = scrambled(tn.decompose(to_library(matrix, library), shape))
    small, info = mpo.compress(
        max_bond=max_bond, rtol=rtol, center_site=center_site, return_info=True
    )
    error, slack = dense_norm(chain(small) - chain(mpo)), 4 * rounding(matrix)
    assert error == pytest.approx(info.error_bound, abs=slack)
    if max_bond is None:
        assert error <= (rtol or 0) * dense_norm(matrix) + slack
    else:
        assert max(small.bond_dims, default=1) <= max_bond
    assert all(new <= old for new, old in zip(small.bond_dims, mpo.bond_dims, strict=True))
    assert small.center_site == (shape.center_site if center_site is None else center_site)
    assert_canonical(small, small.center_site)
    assert small.dtype == mpo.dtype


@given(matrices, libraries, max_bonds)
def test_redundant_sums_are_compressed_to_the_exact_ranks(case, library, max_bond):
    shape, matrix = case
    like = to_library(np.zeros((), matrix.dtype), library)
    a = tn.MPO.random(shape, max_bond, 0, like)
    b = tn.MPO.random(shape, 2, 1, like)
    exact, other = a.compress().bond_dims, b.compress().bond_dims
    assert (a + a).compress().bond_dims == exact
    assert (a - a + b).compress().bond_dims == other
    assert (a + tn.MPO.zeros(shape, like)).compress().bond_dims == exact
    assert (a - a).compress().bond_dims == (1,) * (shape.sites - 1)


@given(matrices, libraries, st.floats(0.05, 1.0))
def test_a_parameter_budget_is_kept(case, library, part):
    shape, matrix = case
    mpo = scrambled(tn.decompose(to_library(matrix, library), shape))
    budget = max(shape.num_params(1), int(part * shape.num_params()))
    small, info = mpo.compress(max_params=budget, return_info=True)
    assert small.num_params <= budget
    assert dense_norm(chain(small) - chain(mpo)) <= info.error_bound + 4 * rounding(matrix)


@given(matrices, libraries)
def test_an_exact_list_of_bonds_is_what_comes_out(case, library):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape)
    bonds = shape.bond_dims([max(1, bond // 2) for bond in shape.bond_dims()] or None)
    assert mpo.compress(bonds=bonds).bond_dims == bonds


@given(matrices, libraries)
def test_compress_and_decompose_agree_on_an_error_that_both_choose(case, library):
    shape, matrix = case
    array = to_library(matrix, library)
    direct, direct_info = tn.decompose(array, shape, rtol=0.2, return_info=True)
    later, later_info = tn.decompose(array, shape).compress(rtol=0.2, return_info=True)
    limit = 0.2 * dense_norm(matrix) + rounding(matrix)
    assert direct_info.error_bound <= limit
    assert later_info.error_bound <= limit
    # The order of cuts differs, so that a value on the threshold may fall either way.
    assert later.num_params <= 1.5 * direct.num_params + 8


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_extreme_scales_in_single_cores_neither_over_nor_underflow(library, scale, dtype):
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))
    mpo = tn.decompose(make_matrix("gaussian", 8, 8, dtype, 0), shape)
    cores = [
        core * np.asarray(factor, dtype)
        for core, factor in zip(mpo.cores, (scale, 1 / scale, scale), strict=True)
    ]
    cores = [to_library(core, library) for core in cores]
    small, info = tn.MPO(cores, shape).compress(max_bond=2, return_info=True)
    _, reference = mpo.compress(max_bond=2, return_info=True)
    assert info.error_bound == pytest.approx(reference.error_bound * scale, rel=1e-4)
    assert np.isfinite(to_numpy(small.to_matrix())).all()


def test_the_norm_of_a_long_chain_of_large_cores_is_rounded_without_overflow():
    shape = tn.MPOShape((2,) * 12, (1,) * 12)
    mpo = tn.MPO.random(shape, 3, 0, np.zeros((), "float32"))
    large = tn.MPO(
        [core * np.float32(1e6) for core in mpo.cores[:6]]
        + [core * np.float32(1e-6) for core in mpo.cores[6:]],
        shape,
    )
    assert large.compress().bond_dims == mpo.compress().bond_dims


@given(matrices, libraries)
def test_vidal_form_rebuilds_the_operator_and_holds_its_schmidt_values(case, library):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape)
    gammas, values = mpo.vidal()
    cores = [gammas[0]]
    for value, gamma in zip(values, gammas[1:], strict=True):
        cores.append(value.reshape(-1, 1, 1, 1) * gamma)
    assert dense_norm(chain(tn.MPO(cores, shape)) - chain(mpo)) <= 4 * rounding(matrix)
    exact = mpo.compress()
    for bond, value in enumerate(values):
        expected = to_numpy(exact.schmidt_values(bond))
        np.testing.assert_allclose(to_numpy(value), expected, atol=4 * rounding(matrix))


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_through_compress_agree_with_finite_differences(rank):
    shape = tn.MPOShape((2, 2, 2), (2, 1, 2))
    mpo = tn.MPO.random(shape, 3, 0, torch.zeros((), dtype=torch.float64))
    cores = [core.clone().requires_grad_() for core in mpo.cores]

    def rounded(*cores):
        return tn.MPO(cores, shape).compress(max_bond=rank, center_site=1).to_matrix()

    assert torch.autograd.gradcheck(rounded, cores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bonds": (5,)}, r"bonds=\(5,\) do not fit"),
        ({"bonds": (3,)}, r"bonds=\(3,\) exceed the bonds that are there: \(2,\)"),
        ({"max_bond": -1}, "max_bond must be a positive integer"),
        ({"rtol": np.inf}, "rtol must be a finite number"),
        ({"max_params": 7}, r"max_params=7 is too few .* with all bonds 1 it has 8 parameters"),
        ({"bonds": (2,), "max_bond": 1}, r"bonds=\(2,\) exceed max_bond=1"),
        ({"bonds": (2,), "max_params": 9}, r"bonds=\(2,\) have 16 parameters, more than"),
        ({"center_site": 2}, "center_site must be an integer"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    mpo = tn.MPO.random(tn.MPOShape((2, 2), (2, 2)), 2, rng=0)
    with pytest.raises(tn.InputError, match=message):
        mpo.compress(**arguments)
