"""ErrorBudget: how much is cut at each bond; what a bond does not use is left to the next."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe.truncation.budget import ErrorBudget
from tnmoe.truncation.limits import Limits

FLAT = np.ones((1, 100))  # squares of 100 in all


def test_a_bond_that_needs_less_than_allowed_leaves_the_rest_to_the_next():
    budget = ErrorBudget((90, 90), [np.array([10.0]), np.array([10.0])])
    weak = np.concatenate([np.ones((1, 90)), np.zeros((1, 10))], axis=1)
    assert budget.choose(0, weak, 100) == (80, pytest.approx(np.sqrt(10)))
    assert budget.choose(1, FLAT, 100) == (90, pytest.approx(np.sqrt(10)))
    budget = ErrorBudget((90, 90), [np.array([10.0]), np.array([10.0])])
    assert budget.choose(0, np.array([[3.0, 2.0, 0.0]]), 3) == (1, 2.0)
    assert budget.choose(1, FLAT, 100)[0] == 84


def test_a_batch_keeps_what_its_most_demanding_matrix_needs():
    budget = ErrorBudget((3,), [np.array([1.0, 1.0])])
    spectra = np.array([[5.0, 1.0, 0.0], [5.0, 4.0, 0.5]])
    rank, cut = budget.choose(0, spectra, 3)
    assert rank == 2
    np.testing.assert_allclose(cut, [0.0, 0.5])


def test_without_a_tolerance_the_ranks_are_kept_and_a_limit_wins():
    assert ErrorBudget((5,)).choose(0, np.zeros((1, 9)), 9)[0] == 5
    assert ErrorBudget((5,)).choose(0, np.zeros((1, 9)), 4)[0] == 4


def test_limits_for_zeros_allow_bonds_of_one():
    shape = tn.MPOShape((2, 2), (2, 2))
    budget = Limits(shape, rtol=0.0).budget([np.zeros((1, 4))])
    assert budget.ranks == (1,)
