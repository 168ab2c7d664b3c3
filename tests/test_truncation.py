"""ErrorBudget: an error spent evenly over the bonds, what one does not need left to the next."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe.truncation import ErrorBudget

FLAT = np.ones(100)  # norm 10; a relative error of 0.5 allows to cut squares of 25 in all


def test_the_first_bond_takes_its_even_share_and_the_last_what_is_left():
    budget = ErrorBudget(rtol=0.5, norm=10.0, bonds=2)
    assert budget.choose_rank(FLAT, cap=100) == (88, pytest.approx(np.sqrt(12)))
    assert budget.choose_rank(FLAT, cap=100) == (87, pytest.approx(np.sqrt(13)))


def test_a_cap_wins_over_the_budget_and_uses_it_up():
    budget = ErrorBudget(rtol=0.5, norm=10.0, bonds=2)
    assert budget.choose_rank(FLAT, cap=10)[0] == 10
    assert budget.choose_rank(FLAT, cap=100) == (100, 0.0)


def test_without_a_tolerance_nothing_is_cut_and_with_one_at_least_one_value_stays():
    zeros = np.zeros(5)
    assert ErrorBudget(None, 0.0, 1).choose_rank(zeros, cap=5) == (5, 0.0)
    assert ErrorBudget(0.0, 0.0, 1).choose_rank(zeros, cap=5) == (1, 0.0)
    assert ErrorBudget(2.0, 10.0, 1).choose_rank(FLAT, cap=100)[0] == 1


def test_the_error_bound_adds_squares():
    info = tn.TruncationInfo(discarded=(3.0, 4.0), spectra=(FLAT, FLAT), methods=("svd", "svd"))
    assert info.error_bound == 5.0
    tiny = tn.TruncationInfo(discarded=(3e-200, 4e-200), spectra=(), methods=())
    assert tiny.error_bound == pytest.approx(5e-200)
