"""Differences seed by seed, and the verdicts that follow from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import claims
from experiments.statistics import chosen, difference, mean_and_spread, values

losses = st.lists(st.floats(0.1, 10), min_size=2, max_size=6)


def results(method, test, rate=1e-3, validation=None, parameters=100):
    return [
        {
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            "parameters": parameters,
            "validation": {"loss": loss if validation is None else validation},
            "test": {"loss": loss},
        }
        for seed, loss in enumerate(test)
    ]


@given(losses, st.integers(0, 2**32 - 1))
def test_a_difference_has_the_interval_of_a_paired_t_test(ours, seed):
    theirs = list(np.random.default_rng(seed).normal(1, 0.3, len(ours)))
    found = difference(results("a", ours) + results("b", theirs), "a", "b", "loss")
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_the_learning_rate_is_chosen_by_validation_and_not_by_the_test():
    some = results("a", [1.0], rate=1e-3, validation=2.0) + results("a", [9.0], 2e-3, 1.0)
    assert [each["test"]["loss"] for each in chosen(some, "a")] == [9.0]


def test_a_rate_is_chosen_over_the_seeds_with_which_all_were_tried():
    some = results("a", [1.0, 4.0, 0.1], rate=1e-3) + results("a", [2.0, 2.0], rate=2e-3)
    assert {each["learning_rate"] for each in chosen(some, "a")} == {2e-3}


def test_a_run_that_diverged_is_never_chosen_and_counts_as_infinite():
    some = results("a", [3.0], rate=1e-3) + results("a", [None], rate=2e-3)
    assert chosen(some, "a")[0]["learning_rate"] == 1e-3
    assert difference(results("a", [None]) + results("b", [1.0]), "a", "b", "loss").mean == np.inf
    several = results("a", [None, 1.0, 2.0]) + results("b", [1.0, 1.0, 1.0])
    assert difference(several, "a", "b", "loss").mean == np.inf
    assert mean_and_spread(list(values(several, "a", "loss").values())) == (np.inf, np.inf)
    (found,) = claims.Comparison("better", "a", "b", margin=9.0).judge({"setting": several})
    assert found.verdict == claims.NOT_CONFIRMED
    assert "diverged" in found.figures


def test_only_seeds_that_both_have_are_compared():
    found = difference(results("a", [1.0, 2.0, 9.0]) + results("b", [1.5, 2.5]), "a", "b", "loss")
    assert found.each == (-0.5, -0.5)
    assert difference(results("a", [1.0]), "a", "b", "loss") is None


def test_one_number_has_no_spread():
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


@pytest.mark.parametrize(
    ("ours", "theirs", "margin", "verdict", "words"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.21], 0.0, claims.CONFIRMED, "3 seeds"),
        ([2.0, 2.1, 2.21], [1.0, 1.1, 1.2], 0.0, claims.NOT_CONFIRMED, "worse"),
        ([1.0, 2.0, 3.0], [2.0, 1.5, 3.0], 0.0, claims.NOT_CONFIRMED, "no clear difference"),
        ([1.0], [2.0], 0.0, claims.NOT_TESTABLE, "-1.0000 nats with one seed: too few"),
        ([1.01, 2.01, 3.011], [1.0, 2.0, 3.0], 0.02, claims.CONFIRMED, "3 seeds"),
        ([1.01, 2.01, 3.011], [1.0, 2.0, 3.0], 0.005, claims.NOT_CONFIRMED, "worse"),
    ],
)
def test_a_claim_is_judged_by_the_interval(ours, theirs, margin, verdict, words):
    some = results("mpoe", ours) + results("moe", theirs)
    (found,) = claims.Comparison("better", "mpoe", "moe", margin).judge({"setting": some})
    assert (found.verdict, found.setting) == (verdict, "setting")
    assert words in found.figures


def test_every_claim_has_a_row_also_without_runs():
    verdicts = claims.judge({"setting": results("mpoe", [1.0, 1.1]) + results("moe", [1.0, 1.1])})
    assert {each.claim for each in verdicts} >= {each.claim for each in claims.COMPARISONS}
    ran = {each.claim for each in verdicts if each.setting == "setting"}
    assert len(ran) == 2  # the comparison, and the ratio at equal quality
    others = {each.verdict for each in verdicts if each.claim not in ran}
    assert others == {claims.NOT_TESTABLE}
    assert len({each.claim for each in claims.COMPARISONS}) == len(claims.COMPARISONS)


def test_the_papers_ratio_is_counted():
    found = claims.ratio_of_the_paper()
    # 110 million parameters that stay, and 12 networks of 2 × 768 × 3072 with 128 copies each.
    assert "ordinary mixture 7,415 million" in found.figures
    assert "split 249 million, 29.8 times fewer" in found.figures


def test_the_ratio_at_equal_quality_is_of_the_smallest_that_is_surely_as_good():
    some = [
        *results("moe", [2.0, 2.1], parameters=1000),
        *results("moe-e4", [2.5, 2.5], parameters=500),
        *results("mpoe", [1.9, 2.0], parameters=300),
        *results("split-64", [2.0, 2.1], parameters=200),
        *results("mpoe-e4", [2.1, 2.2], parameters=100),
        *results("mpoe-e2", [1.0, 3.0], parameters=50),  # equal on the average, and unsure
    ]
    found = claims.ratio_at_equal_quality("setting", some)
    assert found.verdict == claims.CONFIRMED
    assert found.figures.startswith("split-64: 200 parameters")
    assert "5.00 times fewer" in found.figures


def test_the_ratio_says_so_where_none_is_as_good_or_there_is_one_seed():
    some = results("moe", [2.0, 2.1], parameters=1000) + results("mpoe", [2.1, 2.2], parameters=10)
    found = claims.ratio_at_equal_quality("setting", some)
    assert found.verdict == claims.NOT_CONFIRMED
    assert "none is as good as moe: 1,000 parameters, loss 2.0500" in found.figures
    assert "the closest, mpoe, has loss +0.1000" in found.figures
    one = [each for each in some if each["seed"] == 0]
    assert claims.ratio_at_equal_quality("setting", one).verdict == claims.NOT_TESTABLE
    assert claims.ratio_at_equal_quality("setting", results("moe", [2.0, 2.1])) is None
