"""Allocations of ranks lie on the convex hull of all allocations, which brute force lists."""

from itertools import pairwise, product

import numpy as np
import pytest

from tnmoe.joint.allocation import best_allocations


def draw(experts, largest, seed):
    """Return ranks, costs and errors of matrices of size (largest + 1) × largest."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(largest + 1)
    squares = np.sort(rng.exponential(size=(experts, largest)) ** 3)[:, ::-1]
    errors = np.zeros((experts, largest + 1))
    errors[:, :-1] = squares[:, ::-1].cumsum(1)[:, ::-1]
    return ranks, ranks * (2 * largest + 1 - ranks), errors


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("experts", "largest"), [(1, 6), (2, 5), (3, 4)])
def test_no_allocation_lies_below_the_hull(experts, largest, seed):
    ranks, costs, errors = draw(experts, largest, seed)
    found = best_allocations(ranks, costs, errors, most=1000)
    sizes = [each.num_params for each in found]
    assert sizes == sorted(set(sizes))
    for each in found:
        chosen = np.array(each.ranks)
        assert each.num_params == costs[chosen].sum()
        assert np.isclose(each.error, errors[np.arange(experts), chosen].sum(), rtol=1e-12)
    for places in product(range(largest + 1), repeat=experts):
        error = errors[np.arange(experts), places].sum()
        least = np.interp(costs[list(places)].sum(), sizes, [each.error for each in found])
        assert error >= least * (1 - 1e-12)


def test_the_first_allocation_is_empty_and_the_last_one_exact():
    ranks, costs, errors = draw(3, 5, 0)
    found = best_allocations(ranks, costs, errors, most=1000)
    assert found[0].ranks == (0, 0, 0)
    assert found[0].num_params == 0
    assert found[-1].ranks == (5, 5, 5)
    assert found[-1].error == 0


@pytest.mark.parametrize("most", [1, 2, 7])
def test_few_allocations_are_some_of_all_and_spread_evenly(most):
    ranks, costs, errors = draw(8, 30, 0)
    every = best_allocations(ranks, costs, errors, most=10**6)
    some = best_allocations(ranks, costs, errors, most=most)
    assert len(some) == most
    assert set(some) <= set(every)
    assert some[-1] == every[-1]
    widest = max(two.num_params - one.num_params for one, two in pairwise(every))
    for one, two in pairwise(some):
        even = every[-1].num_params / (most - 1)
        assert abs(two.num_params - one.num_params - even) <= widest


def test_small_errors_beside_large_ones_keep_their_digits():
    ranks, costs = np.arange(3), np.array([0, 3, 4])
    errors = np.array([[3e40, 1e40, 0.0], [3e-40, 1e-40, 0.0]])
    found = best_allocations(ranks, costs, errors, most=99)
    assert [each.ranks for each in found] == [(0, 0), (2, 0), (2, 2)]
    np.testing.assert_allclose([each.error for each in found], [3e40, 3e-40, 0.0], rtol=1e-12)


def test_matrices_without_errors_come_last():
    ranks, costs = np.arange(3), np.array([0, 3, 4])
    errors = np.array([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    found = best_allocations(ranks, costs, errors, most=99)
    assert [each.ranks for each in found] == [(0, 0), (0, 2), (2, 2)]
