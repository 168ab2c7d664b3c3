"""ErrorBudget: how much is cut at each bond; what one bond does not need is left to the next."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe.truncation.limits import ErrorBudget, Limits

FLAT = np.ones((1, 100))  # squares of 100 in all


def test_a_bond_that_needs_less_than_planned_leaves_the_rest_to_the_next():
    plan = ErrorBudget((90, 90), [np.array([10.0]), np.array([10.0])])
    weak = np.concatenate([np.ones((1, 90)), np.zeros((1, 10))], axis=1)
    assert plan.choose(0, weak, 100) == (80, pytest.approx(np.sqrt(10)))
    assert plan.choose(1, FLAT, 100) == (90, pytest.approx(np.sqrt(10)))
    plan = ErrorBudget((90, 90), [np.array([10.0]), np.array([10.0])])
    assert plan.choose(0, np.array([[3.0, 2.0, 0.0]]), 3) == (1, 2.0)
    assert plan.choose(1, FLAT, 100)[0] == 84


def test_a_batch_keeps_what_its_most_demanding_matrix_needs():
    plan = ErrorBudget((3,), [np.array([1.0, 1.0])])
    spectra = np.array([[5.0, 1.0, 0.0], [5.0, 4.0, 0.5]])
    rank, cut = plan.choose(0, spectra, 3)
    assert rank == 2
    np.testing.assert_allclose(cut, [0.0, 0.5])


def test_without_a_tolerance_the_ranks_are_kept_and_a_limit_wins():
    assert ErrorBudget((5,)).choose(0, np.zeros((1, 9)), 9)[0] == 5
    assert ErrorBudget((5,)).choose(0, np.zeros((1, 9)), 4)[0] == 4


def test_a_selection_of_zeros_plans_bonds_of_one():
    shape = tn.MPOShape((2, 2), (2, 2))
    plan = Limits(shape, rtol=0.0).plan([np.zeros((1, 4))])
    assert plan.ranks == (1,)


def test_the_error_bound_adds_squares():
    info = tn.TruncationInfo(discarded=(3.0, 4.0), spectra=(FLAT, FLAT), methods=("svd", "svd"))
    assert info.error_bound == 5.0
    tiny = tn.TruncationInfo(discarded=(3e-200, 4e-200), spectra=(), methods=())
    assert tiny.error_bound == pytest.approx(5e-200)
