"""Budgets of whole models, against all choices."""

from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tnmoe.truncation import distribute

tables = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


def cost(options, chosen):
    return sum(table[number][0] for table, number in zip(options, chosen, strict=True))


def error(options, chosen):
    return sum(table[number][1] for table, number in zip(options, chosen, strict=True))


@given(tables, st.integers(1, 200))
def test_no_other_choice_within_the_budget_has_less_error(options, budget):
    fitting = [
        choice
        for choice in product(*(range(len(table)) for table in options))
        if cost(options, choice) <= budget
    ]
    if not fitting:
        with pytest.raises(tn.InputError, match=f"budget={budget} is too small"):
            tn.distribute_budget(options, budget)
        return
    chosen = tn.distribute_budget(options, budget)
    assert cost(options, chosen) <= budget
    assert error(options, chosen) == min(error(options, choice) for choice in fitting)


@given(tables, st.integers(1, 200))
def test_thinned_choices_are_as_good_as_those_of_a_smaller_budget(options, budget):
    smaller = int(budget * (1 - len(options) / 8))
    if sum(min(size for size, _ in table) for table in options) > smaller:
        return
    with patch.object(distribute, "_MOST_POINTS", 8):
        chosen = tn.distribute_budget(options, budget)
    assert cost(options, chosen) <= budget
    assert error(options, chosen) <= error(options, tn.distribute_budget(options, smaller))


def test_a_large_model_uses_its_budget():
    rng = np.random.default_rng(0)
    options = []
    for _ in range(60):
        sizes = np.cumsum(rng.integers(1, 10**6, size=40))
        errors = rng.uniform(0.1, 10) * np.exp(-np.arange(40) / rng.uniform(2, 20))
        options.append(list(zip(sizes.tolist(), errors.tolist(), strict=True)))
    budget = sum(table[20][0] for table in options)
    chosen = tn.distribute_budget(options, budget)
    assert 0.999 * budget < cost(options, chosen) <= budget
    assert error(options, chosen) < 0.9 * error(options, [20] * 60)


def test_costs_near_the_largest_integers_add_up():
    huge = [(2**50, 2.0), (2**61, 1.0), (2**63 - 1, 0.5), (2**80, 0.0)]
    assert tn.distribute_budget([huge] * 4, 2**61 + 2**53) == (0, 0, 0, 1)
    with patch.object(distribute, "_MOST_POINTS", 2):
        assert tn.distribute_budget([huge] * 4, 2**61) == (0, 0, 0, 0)


def test_a_model_without_matrices_needs_no_choice():
    assert tn.distribute_budget([], 1) == ()


def test_bad_input_is_named():
    for options, budget, message in (
        ([[]], 5, "matrix 0 has no options"),
        ([[(1, 2.0)], [(0, 1.0)]], 5, "every cost of matrix 1"),
        ([None], 5, "matrix 0 needs a sequence of options, got None"),
        ([[7]], 5, "an option is a cost and an error, got 7"),
        ([[(4, 1.0)]], 2**62, "budget"),
        ([[(1, -1.0)]], 5, "every error of matrix 0"),
        ([[(1, float("nan"))]], 5, "every error of matrix 0"),
        ([[(1, 2, 3)]], 5, r"an option is a cost and an error, got \(1, 2, 3\)"),
        ([[(4, 1.0)], [(3, 1.0)]], 6, "budget=6 is too small: the cheapest options cost 7"),
        ([[(4, 1.0)]], 0, "budget"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.distribute_budget(options, budget)
