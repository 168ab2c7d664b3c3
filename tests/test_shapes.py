"""MPOShape: sizes, exact bonds, parameter counts, padding."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import shapes


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


@given(shapes())
def test_legs_around_a_site_multiply_to_the_padded_matrix(shape):
    for site in range(shape.sites):
        outs, ins = shape.legs_around(site)
        assert (prod(outs), prod(ins)) == (shape.padded_out, shape.padded_in)
        assert (outs[1], ins[1]) == (shape.out_dims[site], shape.in_dims[site])
        assert shape.is_split(site) == (outs[2] == 1 == ins[0])


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
