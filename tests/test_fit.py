"""Variational fits, against dense algebra and against rounding."""

import numpy as np
import pytest
from hypothesis import given, settings

import tnmoe as tn
from tests.matrices import dense_norm, libraries
from tests.operators import SHAPE, a_mpo, dense, dtypes, random_mpo, scaled, seeds


@settings(max_examples=40)
@given(dtypes, libraries, seeds)
def test_a_fit_finds_an_operator_that_has_the_bonds(dtype, library, seed):
    targets = [random_mpo(SHAPE, dtype, library, seed, 2), random_mpo(SHAPE, dtype, library, 1, 1)]
    fitted, info = tn.fit(targets, bonds=(3, 3, 3), return_info=True)
    expected = sum(map(dense, targets))
    assert dense_norm(dense(fitted) - expected) <= 1e-2 * dense_norm(expected)
    assert fitted.bond_dims == (3, 3, 3)
    assert fitted.center_site == 0
    slack = 1e-3 if ("64" in dtype and "complex" in dtype) or dtype == "float32" else 1e-7
    assert all(new <= old + slack for old, new in zip(info.errors, info.errors[1:], strict=False))


@settings(max_examples=40)
@given(dtypes, libraries, seeds)
def test_a_fit_is_never_worse_than_the_rounding_it_starts_from(dtype, library, seed):
    target = random_mpo(SHAPE, dtype, library, seed, 5)
    start, info = target.compress(max_bond=2, return_info=True)
    fitted = tn.fit(target, initial=start)
    error = dense_norm(dense(fitted) - dense(target))
    assert error <= info.error_bound + 1e-5 * dense_norm(dense(target))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("float32", 1e-25),
        ("float32", 1.0),
        ("float32", 1e25),
        ("float64", 1e-170),
        ("float64", 1e200),
    ],
)
def test_a_fit_measures_its_error_at_any_size(dtype, scale):
    one = np.zeros((), dtype)
    target = tn.MPO.random(tn.MPOShape((3, 3, 3), (3, 3, 3)), 6, rng=0, like=one)
    fitted, info = tn.fit(scaled(target, scale), max_bond=2, return_info=True)
    error = dense_norm(dense(scaled(fitted, 1 / scale)) - dense(target)) / dense_norm(dense(target))
    assert info.converged
    assert info.errors[-1] == pytest.approx(error, rel=1e-4)
    assert fitted.dtype == dtype


def test_a_fit_of_zeros_is_zero():
    fitted, info = tn.fit(tn.MPO.zeros(SHAPE), max_bond=2, return_info=True)
    assert info.errors[-1] == 0
    assert float(fitted.norm()) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.fit([], max_bond=1), "at least one target"),
        (lambda: tn.fit(a_mpo()), "needs max_bond, bonds or an initial"),
        (lambda: tn.fit(a_mpo(), max_bond=1, initial=a_mpo()), "brings its own"),
        (
            lambda: tn.fit(a_mpo(), initial=tn.MPO.zeros(SHAPE)),
            "a fit needs operators of one",
        ),
        (lambda: tn.fit(a_mpo(), max_bond=1, tol="x"), "tol must be in .*'x'"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
