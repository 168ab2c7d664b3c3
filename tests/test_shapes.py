"""MPOShape and factorize: sizes, exact bonds, parameter counts, padding."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
import tnmoe.shapes as shapes_module
from tests.matrices import shapes


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


def test_the_shapes_of_the_paper_are_what_the_picker_finds():
    shape = tn.MPOShape.for_matrix(3072, 768, sites=5)
    assert shape == tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    assert shape.bond_dims() == (12, 192, 384, 16)
    auxiliary = shape.num_params() - 3072 * 768
    assert auxiliary / (3072 * 768) == pytest.approx(0.078, abs=5e-4)


@given(shapes())
def test_exact_bonds_are_the_smaller_side_of_every_cut(shape):
    legs = [o * i for o, i in zip(shape.out_dims, shape.in_dims, strict=True)]
    cuts = range(1, shape.sites)
    assert shape.bond_dims() == tuple(min(prod(legs[:c]), prod(legs[c:])) for c in cuts)


@given(shapes(), st.integers(1, 40))
def test_limited_bonds_obey_the_limit_and_never_exceed_what_neighbours_use(shape, max_bond):
    bonds = (1, *shape.bond_dims(max_bond), 1)
    assert max(bonds) <= max_bond
    for site, (out, in_) in enumerate(zip(shape.out_dims, shape.in_dims, strict=True)):
        assert bonds[site + 1] <= bonds[site] * out * in_
        assert bonds[site] <= bonds[site + 1] * out * in_


@given(shapes())
def test_the_central_core_holds_as_many_numbers_as_the_matrix(shape):
    sizes = [prod(core) for core in shape.core_shapes()]
    assert sizes[shape.center_site] == shape.padded_out * shape.padded_in == max(sizes)
    assert sum(sizes) == shape.num_params()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 6))
def test_padding_is_small_and_only_where_factors_are_bad(out_features, in_features, sites):
    shape = tn.MPOShape.for_matrix(out_features, in_features, sites)
    assert (shape.out_features, shape.in_features) == (out_features, in_features)
    for size, padded, dims in (
        (out_features, shape.padded_out, shape.out_dims),
        (in_features, shape.padded_in, shape.in_dims),
    ):
        assert max(dims) <= 8 * padded ** (1 / sites)
        assert padded >= size
        own = tn.factorize(size, sites)
        assert (padded == size) == (max(own) <= 8 * size ** (1 / sites))


@pytest.mark.parametrize("sites", [1, 2, 5, 12, 30, 64, 100])
@pytest.mark.parametrize("size", [10**9 + 7, 2**40 - 87, 2**40, 963761198400])
def test_the_largest_sizes_split_after_a_bounded_number_of_tries(size, sites, monkeypatch):
    tried, is_even = [], shapes_module._is_even
    monkeypatch.setattr(
        shapes_module, "_is_even", lambda *args: tried.append(args) or is_even(*args)
    )
    shape = tn.MPOShape.for_matrix(size, 1, sites=sites)
    assert shape.out_features == size <= shape.padded_out <= 1.25 * size
    assert len(tried) <= 2**14 + 20


@given(st.integers(1, 10**6))
def test_where_no_size_near_will_do_one_with_small_factors_is_taken(n):
    size = rest = shapes_module._smooth(n)
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


def test_shapes_of_any_size_print():
    assert "20001 bits" in repr(tn.MPOShape((2,) * 20_001, (1,) * 20_001, 2**20_000))


def test_split_puts_output_legs_left_and_input_legs_right():
    shape = tn.MPOShape.split(3072, 768, left=(8, 8), right=[16, 4])
    assert shape.out_dims == (8, 8, 48, 1, 1)
    assert shape.in_dims == (1, 1, 12, 16, 4)
    assert shape.center_site == 2


def test_numpy_integers_are_integers():
    shape = tn.MPOShape(np.array([2, 3]), np.array([4, 1]), np.int64(5))
    assert shape == tn.MPOShape((2, 3), (4, 1), 5)
    assert shape.bond_dims(np.int32(2)) == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.MPOShape((2, 2), (2,)), r"got out_dims=\(2, 2\) \(2 sites\)"),
        (lambda: tn.MPOShape((), ()), "at least one site"),
        (lambda: tn.MPOShape((2, 0), (2, 2)), r"out_dims=\(2, 0\) must be a positive integer"),
        (lambda: tn.MPOShape((2, 2.5), (2, 2)), "positive integer, got 2.5"),
        (lambda: tn.MPOShape((2, True), (2, 2)), "positive integer, got True"),
        (lambda: tn.MPOShape(4, (2, 2)), "out_dims must be a sequence"),
        (lambda: tn.MPOShape((2, 2), (2, 2), out_features=5), "whose product is 4"),
        (lambda: tn.MPOShape.split(100, 64, left=64), "64, which does not divide out_features=100"),
        (lambda: tn.MPOShape.split(64, 100, right=64), "does not divide in_features=100"),
        (lambda: tn.factorize(0, 2), "n must be a positive integer, got 0"),
        (lambda: tn.factorize(8, 0), "sites must be a positive integer, got 0"),
        (lambda: tn.factorize(8, 101), "sites must be at most 100, got 101"),
        (
            lambda: tn.factorize(2**40 + 1, 3),
            r"n must be at most 2\*\*40 to be split into legs, got",
        ),
        (lambda: tn.MPOShape.for_matrix(768, 768, sites=900), "sites must be at most 100, got 900"),
        (
            lambda: tn.MPOShape.for_matrix(8, 2**50),
            r"in_features must be at most 2\*\*40 to be split into legs, got",
        ),
        (lambda: tn.MPOShape((2,), (2,), out_features=10**5000), "=an integer of 16610 bits does"),
        (lambda: tn.MPOShape((2,) * 20_000, (2,)), r"out_dims=\(2, 2, .* … .* \(1 sites\)"),
        (lambda: tn.MPOShape((2, 2), (2, 2)).bond_dims((1, 2)), r"got \(1, 2\) for 1 bonds"),
        (lambda: tn.MPOShape((2, 2), (2, 2)).bond_dims(-1), "got -1"),
    ],
)
def test_bad_shapes_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
