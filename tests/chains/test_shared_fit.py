"""Least squares for chains that share cores, against dense least squares."""

from itertools import product

import numpy as np
import pytest

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe.backends import get_backend
from tnmoe.chains.moments import Moments
from tnmoe.chains.shared_fit import _Equations, fit_shared

# Three sites with the legs (2 × 2), (3 × 1) and (1 × 3), bonds of 3 and 2.
OUT_DIMS, IN_DIMS, BONDS, E = (2, 3, 1), (2, 1, 3), (1, 3, 2, 1), 3
LEGS = tuple(out * in_ for out, in_ in zip(OUT_DIMS, IN_DIMS, strict=True))


def gaussian(*size, seed=0, dtype="float64"):
    numbers = np.random.default_rng(seed).standard_normal((2, *size))
    return numbers[0] + 1j * numbers[1] if "complex" in dtype else numbers[0]


def start(shared, dtype="float64"):
    return [
        gaussian(1 if k in shared else E, BONDS[k], LEGS[k], BONDS[k + 1], seed=k, dtype=dtype)
        for k in range(3)
    ]


def chains(cores):
    """All chains, (E, 4, 3, 3)."""
    whole = [np.broadcast_to(core, (E, *core.shape[1:])) for core in cores]
    return np.einsum("eaxb,ebyc,eczd->exyz", *whole)


def root_of(moments):
    """The factor of moments, as a matrix between the legs of all sites."""
    factor = np.linalg.cholesky(moments).reshape(-1, 2, 1, 3, 2, 1, 3)
    eye = [np.eye(out) for out in OUT_DIMS]
    dense = np.einsum("pu,qv,rw,eijkxyz->epiqjrkuxvywz", *eye, factor)
    return dense.reshape(len(moments), 36, 36)


def missed(targets, cores, root):
    rest = (targets - chains(cores)).reshape(E, 1, 36)
    return np.linalg.norm(rest @ root)


def best_core(targets, cores, site, root):
    """The best core beside the others, by dense least squares over all of its entries."""
    size = cores[site].shape
    columns = []
    for place in product(*map(range, size)):
        unit = np.zeros(size, targets.dtype)
        unit[place] = 1
        trial = [*cores[:site], unit, *cores[site + 1 :]]
        columns.append((chains(trial).reshape(E, 1, 36) @ root).ravel())
    goal = (targets.reshape(E, 1, 36) @ root).ravel()
    solution = np.linalg.lstsq(np.stack(columns, 1), goal, rcond=None)[0]
    return [*cores[:site], solution.reshape(size), *cores[site + 1 :]]


@pytest.mark.parametrize(
    ("library", "dtype", "has_moments"),
    [
        ("numpy", "float64", False),
        ("numpy", "complex128", False),
        ("numpy", "complex128", True),
        ("torch", "complex128", False),
        (LIBRARIES[-1], "float64", True),
    ],
)
@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_no_core_can_be_improved_beside_the_others(shared, has_moments, dtype, library):
    targets = gaussian(E, *LEGS, seed=9, dtype=dtype)
    inputs = gaussian(E, 6, 20, seed=8, dtype=dtype)
    moments = inputs @ inputs.conj().swapaxes(1, 2) / 20
    root = root_of(moments) if has_moments else np.eye(36)[None]
    given = [to_library(core, library) for core in start(shared, dtype)]
    flat = to_library(targets.reshape(E, 36), library)
    xp = get_backend(flat)
    weights = Moments(xp, to_library(moments, library), OUT_DIMS, IN_DIMS)
    fit = fit_shared(xp, flat, given, 150, 0.0, weights if has_moments else None)
    cores = [to_numpy(core) for core in fit.cores]
    error = missed(targets, cores, root)
    assert np.isclose(fit.error, error / np.linalg.norm(targets.reshape(E, 1, 36) @ root))
    assert fit.errors == sorted(fit.errors, reverse=True)
    assert fit.error < fit.errors[0]
    for site in range(3):
        better = missed(targets, best_core(targets, cores, site, root), root)
        assert error - better <= 2e-3 * error


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), ()])
def test_one_sweep_is_the_best_core_of_every_site_in_turn(shared):
    # The oracle replaces the cores one by one. The gauge changes no chain.
    targets, cores = gaussian(E, *LEGS, seed=9), start(shared)
    xp, root = get_backend(targets), np.eye(36)[None]
    fit = fit_shared(xp, targets.reshape(E, 36), cores, 1, 0.0)
    for site in range(3):
        cores = best_core(targets, cores, site, root)
    np.testing.assert_allclose(chains([*map(np.asarray, fit.cores)]), chains(cores), atol=1e-6)


def test_conjugate_gradients_solve_the_sum_of_all_experts_equations():
    grams = [
        factor @ factor.swapaxes(1, 2)
        for factor in (gaussian(E, 3, 5, seed=1), gaussian(E, 2, 4, seed=2))
    ]
    projected = gaussian(E, 3, 4, 2, seed=3)
    equations = _Equations(get_backend(projected), *grams, E, is_owned=False)
    found = equations.solve(projected, np.zeros((1, 3, 4, 2)))
    matrix = sum(np.kron(left, right.T) for left, right in zip(*grams, strict=True))
    goal = projected.sum(0).swapaxes(0, 1).reshape(4, 6)
    expected = np.linalg.solve(matrix, goal.T).T.reshape(4, 3, 2).swapaxes(0, 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-8, atol=1e-10)


def test_sweeps_end_where_they_gain_little():
    targets, cores = gaussian(E, *LEGS, seed=9), start((1,))
    xp = get_backend(targets)
    all_sweeps = fit_shared(xp, targets.reshape(E, 36), cores, 40, 0.0)
    few = fit_shared(xp, targets.reshape(E, 36), cores, 40, 1e-2)
    assert few.converged
    gains = -np.diff(all_sweeps.errors)
    assert len(few.errors) == 2 + int(np.argmax(gains < 1e-2))
    assert not fit_shared(xp, targets.reshape(E, 36), cores, 2, 1e-9).converged
    done = fit_shared(xp, 0 * targets.reshape(E, 36), cores, 2, 1e-9)
    assert (done.error, done.converged) == (0.0, True)
