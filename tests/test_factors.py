"""factorize: even factors, sizes to pad to, and what is refused."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
import tnmoe.factors as factors_module


def brute_force_factors(n: int, sites: int) -> set[tuple[int, ...]]:
    if sites == 1:
        return {(n,)}
    return {
        tuple(sorted((d, *rest)))
        for d in range(1, n + 1)
        if n % d == 0
        for rest in brute_force_factors(n // d, sites - 1)
    }


@given(st.integers(1, 400), st.integers(1, 5))
def test_factorize_gives_the_most_even_factors_with_the_largest_in_the_middle(n, sites):
    factors = tn.factorize(n, sites)
    assert len(factors) == sites
    assert prod(factors) == n
    assert sum(factors) == min(map(sum, brute_force_factors(n, sites)))
    assert max(factors) == factors[sites // 2]


@pytest.mark.parametrize("sites", [1, 2, 5, 12, 30, 64, 100])
@pytest.mark.parametrize("size", [10**9 + 7, 2**40 - 87, 2**40, 963761198400])
def test_the_largest_sizes_split_after_a_bounded_number_of_tries(size, sites, monkeypatch):
    tried, is_even = [], factors_module._has_even_factors
    monkeypatch.setattr(
        factors_module, "_has_even_factors", lambda *args: tried.append(args) or is_even(*args)
    )
    shape = tn.MPOShape.for_matrix(size, 1, sites=sites)
    assert shape.out_features == size <= shape.padded_out <= 1.25 * size
    assert len(tried) <= 2**14 + 20


@given(st.integers(1, 10**6))
def test_where_no_size_near_will_do_one_with_small_factors_is_taken(n):
    size = rest = factors_module._next_smooth(n)
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1
    assert n <= size < 2 * n


@pytest.mark.parametrize(
    "split", [lambda n: tn.factorize(n, 5), lambda n: tn.MPOShape.for_matrix(2, n)]
)
def test_sizes_that_no_matrix_has_are_refused(split):
    with pytest.raises(tn.InputError, match=rf"must be at most 2\*\*40 .*, got {2**60}"):
        split(2**60)


def test_more_sites_than_factors_have_legs_of_1():
    assert tn.factorize(12, 100).count(1) == 97
    assert sorted(tn.factorize(12, 100))[-3:] == [2, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.factorize(0, 2), "n must be a positive integer, got 0"),
        (lambda: tn.factorize(8, 0), "sites must be a positive integer, got 0"),
        (lambda: tn.factorize(8, 101), "sites must be at most 100, got 101"),
        (
            lambda: tn.factorize(2**40 + 1, 3),
            r"n must be at most 2\*\*40 to be split into legs, got",
        ),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
