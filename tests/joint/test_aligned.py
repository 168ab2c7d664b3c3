"""Joint decompositions and orders of hidden units by turns, against known permutations."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.matrices import to_library


def family(experts=4, rank=2, size=1.0, seed=0, is_gated=False):
    """Networks that are one ancestor plus matrices of low rank, in other orders of the units."""
    rng = np.random.default_rng(seed)
    matrices, orders = [], [rng.permutation(24) for _ in range(experts)]
    for rows, columns in ((24, 16), (16, 24), (24, 16)):
        own = rng.normal(size=(experts, rows, rank)) @ rng.normal(size=(experts, rank, columns))
        matrices.append(rng.normal(size=(rows, columns)) + size * own)
    up, down, gate = matrices
    up = np.stack([each[order] for each, order in zip(up, orders, strict=True)])
    down = np.stack([each[:, order] for each, order in zip(down, orders, strict=True)])
    gate = np.stack([each[order] for each, order in zip(gate, orders, strict=True)])
    return ([up, down, gate] if is_gated else [up, down]), np.stack(orders)


def residual(name, matrices):
    return tn.decompose_shared(matrices, residual=True, max_bond=2, max_sweeps=100, tol=1e-7)


def rms(matrices, shared):
    """The root mean square of the relative errors, by NumPy."""
    squares = [
        np.linalg.norm(each - other.to_matrices(), axis=(1, 2)) ** 2
        / np.linalg.norm(each, axis=(1, 2)) ** 2
        for each, other in zip(matrices, shared, strict=True)
    ]
    return np.sqrt(np.mean(squares))


def is_recovered(found, orders):
    """Whether all networks have their units in one order."""
    ancestors = np.take_along_axis(orders, found.alignment.permutations, axis=1)
    return (ancestors == ancestors[0]).all()


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("size", [0.3, 1.0, 1.5])
def test_orders_of_networks_with_an_ancestor_are_recovered(size, is_gated):
    matrices, orders = family(size=size, is_gated=is_gated, seed=3)
    found = tn.decompose_aligned(*matrices, decompose=residual)
    assert is_recovered(found, orders)
    assert found.errors[-1] < 1e-5
    assert found.gain > 0.9999
    for before, after in pairwise(found.errors):
        assert after < before
    shared = [found.up, found.down, found.gate][: len(matrices)]
    assert np.isclose(found.errors[-1], rms(found.alignment.apply(*matrices), shared))
    assert np.isclose(found.errors[0], rms(matrices, map(residual, "aaa", matrices)))
    assert found.alignment.after > found.alignment.before


def test_orders_that_the_mean_does_not_find_are_found():
    matrices, orders = family(size=2.5, seed=3)
    mean = tn.align_hidden_units(*matrices).permutations
    ancestors = np.take_along_axis(orders, mean, axis=1)
    assert (ancestors != ancestors[0]).mean() > 0.3
    found = tn.decompose_aligned(*matrices, decompose=residual)
    assert is_recovered(found, orders)
    assert len(found.errors) > 4


def test_equal_networks_are_recovered_to_rounding():
    matrices, orders = family(size=0.0)
    found = tn.decompose_aligned(*matrices, decompose=residual)
    assert is_recovered(found, orders)
    assert found.errors[-1] < 1e-14


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_library_and_dtype(dtype):
    matrices, orders = family(size=0.3)
    for library in ("numpy", "torch"):
        arrays = [to_library(each.astype(dtype), library) for each in matrices]
        found = tn.decompose_aligned(*arrays, decompose=residual)
        assert is_recovered(found, orders)
        assert type(found.up.cores[0]) is type(arrays[0])


def test_the_given_order_stays_where_no_other_gains():
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(3, 12, 8)), rng.normal(size=(3, 8, 12))
    calls = []

    def exact(name, matrices):
        calls.append(name)
        return tn.decompose_shared(matrices, residual=True)

    found = tn.decompose_aligned(up, down, decompose=exact)
    assert (found.alignment.permutations == np.arange(12)).all()
    assert (found.gain, found.alignment.rounds) == (0.0, 0)
    assert len(found.errors) == 1
    assert len(calls) <= 8
    zeros = tn.decompose_aligned(0 * up, 0 * down, decompose=exact)
    assert zeros.errors == (0.0,)


@pytest.mark.parametrize("seed", range(3))
def test_chains_without_a_base_never_lose(seed):
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(12, 8)) + 0.5 * rng.normal(size=(3, 12, 8))
    down = (rng.normal(size=(12, 8)) + 0.5 * rng.normal(size=(3, 12, 8))).swapaxes(1, 2)
    shapes = {"up": tn.MPOShape((4, 3), (1, 8)), "down": tn.MPOShape((1, 8), (4, 3))}

    def split(name, matrices):
        return tn.decompose_shared(matrices, shapes[name], max_bond=3)

    found = tn.decompose_aligned(up, down, decompose=split, tol=0)
    assert found.errors[-1] <= found.errors[0]
    aligned = found.alignment.apply(up, down)
    assert np.isclose(found.errors[-1], rms(aligned, [found.up, found.down]))


def test_one_network_gains_by_units_in_the_order_of_their_norms():
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=24))
    up = rng.normal(size=(1, 24, 8)) * scales[:, None]
    down = rng.normal(size=(1, 8, 24)) * scales
    shapes = {"up": tn.MPOShape((6, 4), (1, 8)), "down": tn.MPOShape((1, 8), (6, 4))}

    def split(name, matrices):
        return tn.decompose_shared(matrices, shapes[name], max_bond=3, shared_sites=[1])

    found = tn.decompose_aligned(up, down, decompose=split)
    assert found.gain > 0.1


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_units_move_toward_their_own_targets(library):
    matrices, _ = family(size=2.0, is_gated=True)
    rng = np.random.default_rng(1)
    orders = np.stack([rng.permutation(24) for _ in range(4)])
    wanted = tn.UnitAlignment(orders, np.ones(orders.shape), 0.0, 0.0, 0).apply(*matrices)
    noisy = [each + 0.1 * rng.normal(size=each.shape) for each in wanted]
    arrays, toward = ([to_library(each, library) for each in group] for group in (matrices, noisy))
    alignment = tn.align_hidden_units(*arrays, toward=toward)
    np.testing.assert_array_equal(alignment.permutations, orders)
    assert alignment.before < alignment.after < 1
    norms = [np.linalg.norm(each, axis=(1, 2)) for each in matrices]
    missed = [np.linalg.norm(a - b, axis=(1, 2)) for a, b in zip(wanted, noisy, strict=True)]
    assert np.isclose(alignment.after, 1 - np.mean(np.square(missed) / np.square(norms)))
    again = tn.align_hidden_units(*wanted, toward=noisy)
    assert (again.permutations == np.arange(24)).all()
    assert (again.rounds, again.before) == (0, again.after)


def test_bad_input_is_named():
    (up, down), _ = family()
    for arguments, message in (
        ({"toward": (up,)}, "toward must hold 2 arrays, one per matrix, got 1"),
        ({"toward": (up, up)}, r"target of down must have its shape \(4, 16, 24\), got \(4, 24"),
        ({"toward": (up * np.nan, down)}, "up contains NaN"),
        ({"toward": (up, down), "rescale": True}, "rescale"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.align_hidden_units(up, down, **arguments)
    for decompose, message in (
        (lambda name, matrices: matrices, "decompose must return a SharedMPO for up, got <class"),
        (lambda name, matrices: residual("up", up), r"down's shape \(4, 16, 24\), got \(4, 24, 16"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose_aligned(up, down, decompose=decompose)
    with pytest.raises(tn.InputError, match="max_rounds"):
        tn.decompose_aligned(up, down, decompose=residual, max_rounds=0)
    with pytest.raises(tn.InputError, match="tol"):
        tn.decompose_aligned(torch.tensor(up), torch.tensor(down), decompose=residual, tol=1)
