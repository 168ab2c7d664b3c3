"""Choosing all bond dimensions at once: the best there are, within what was asked for."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.matrices import LIBRARIES, to_library
from tnmoe.decompose import decompose
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape
from tnmoe.truncation import search
from tnmoe.truncation.search import choose_bonds
from tnmoe.truncation.select import bonds_by_entropy, select_bonds
from tnmoe.truncation.spectra import squared_tails

SHAPE = MPOShape((4, 4, 4), (4, 4, 4))
SPECTRA = [2.0 ** -np.arange(16), 4.0 ** -np.arange(16)]
LARGE = {
    "3072 × 768 over 5 sites": MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    "bonds 32, 1280, 1280, 32": MPOShape((8, 8, 8, 8, 8), (4, 5, 5, 5, 4)),
    "4096 × 4096 over 12 sites": MPOShape.for_matrix(4096, 4096, 12),
}
DECAYS = ("flat", "exponential", "power", "random")


def make_spectrum(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    place = np.arange(size) / size
    if kind == "flat":
        values = np.sqrt(1 - place * rng.uniform(0, 0.99))
    elif kind == "exponential":
        values = np.exp(-rng.uniform(1, 20) * place)
    elif kind == "power":
        values = (1.0 + np.arange(size)) ** -rng.uniform(0.3, 3)
    elif kind == "random":
        values = np.sort(rng.random(size) ** rng.uniform(0.5, 4))[::-1]
    elif kind == "equal":
        values = np.ones(size)
    elif kind == "with zeros":
        values = np.sort(rng.random(size))[::-1] * (place < rng.random())
    return values


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[list[np.ndarray], MPOShape, tuple[int, ...]]:
    """Tails, shape and caps with few enough choices to look at all of them."""
    legs = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    shape = MPOShape(legs, [draw(st.integers(1, 2)) for _ in legs])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = st.sampled_from((*DECAYS, "equal", "with zeros"))
    exact = shape.bond_dims()
    tails = [squared_tails(make_spectrum(draw(kinds), size, rng)) for size in exact]
    caps = shape.bond_dims([draw(st.integers(1, min(6, size))) for size in exact])
    return tails, shape, caps


def error_of(tails: list[np.ndarray], bonds: tuple[int, ...]) -> float:
    return sum(tail[bond] for tail, bond in zip(tails, bonds, strict=True))


def all_choices(shape: MPOShape, caps: tuple[int, ...]) -> list[tuple[int, ...]]:
    ranges = [range(1, cap + 1) for cap in caps]
    return [bonds for bonds in product(*ranges) if shape.bond_dims(bonds) == bonds]


def uniform_split(
    tails: list[np.ndarray], shape: MPOShape, caps: tuple[int, ...], allowed: float
) -> tuple[int, ...]:
    """Every bond gets the same share of the error; ranks too small for a neighbour are raised."""
    share = allowed / len(tails)
    ranks = [
        min(cap, max(1, int(np.argmax(tail <= share))))
        for tail, cap in zip(tails, caps, strict=True)
    ]
    padded = [1, *ranks, 1]
    legs = [out * in_ for out, in_ in zip(shape.out_dims, shape.in_dims, strict=True)]
    for _ in legs:
        for site, leg in enumerate(legs):
            left, right = padded[site], padded[site + 1]
            padded[site], padded[site + 1] = (
                max(left, -(-right // leg)),
                max(right, -(-left // leg)),
            )
    return tuple(padded[1:-1])


fractions = st.floats(0, 1)


@given(small_cases(), fractions)
def test_an_error_is_met_with_the_fewest_parameters_there_are(case, fraction):
    tails, shape, caps = case
    least = error_of(tails, caps)
    allowed = fraction**4 * error_of(tails, (0,) * len(tails))
    chosen = choose_bonds(tails, shape, caps, allowed)
    assert error_of(tails, chosen) <= max(allowed, least)
    assert shape.num_params(chosen) == min(
        shape.num_params(bonds)
        for bonds in all_choices(shape, caps)
        if error_of(tails, bonds) <= max(allowed, least)
    )


@given(small_cases(), fractions)
def test_a_number_of_parameters_buys_the_least_error_there_is(case, fraction):
    tails, shape, caps = case
    fewest, most = shape.num_params(1), shape.num_params(caps)
    budget = fewest + int(fraction * (most - fewest))
    chosen = choose_bonds(tails, shape, caps, max_params=budget)
    assert (error_of(tails, chosen), shape.num_params(chosen)) == min(
        (error_of(tails, bonds), shape.num_params(bonds))
        for bonds in all_choices(shape, caps)
        if shape.num_params(bonds) <= budget
    )


@given(small_cases(), fractions, fractions)
def test_of_an_error_and_a_number_of_parameters_the_latter_wins(case, error_part, size_part):
    tails, shape, caps = case
    allowed = error_part**4 * error_of(tails, (0,) * len(tails))
    fewest = shape.num_params(1)
    budget = fewest + int(size_part * (shape.num_params(caps) - fewest))
    chosen = choose_bonds(tails, shape, caps, allowed, budget)
    alone = choose_bonds(tails, shape, caps, allowed)
    if shape.num_params(alone) <= budget:
        assert chosen == alone
    else:
        assert chosen == choose_bonds(tails, shape, caps, max_params=budget)


@given(small_cases(), fractions)
def test_no_more_parameters_than_when_every_bond_gets_the_same_share(case, fraction):
    tails, shape, caps = case
    allowed = fraction**4 * error_of(tails, (0,) * len(tails))
    uniform = uniform_split(tails, shape, caps, allowed)
    if error_of(tails, uniform) <= allowed:
        chosen = choose_bonds(tails, shape, caps, allowed)
        assert shape.num_params(chosen) <= shape.num_params(uniform)


@given(small_cases(), fractions)
def test_the_local_search_meets_the_goal_and_is_no_worse_than_a_common_error(case, fraction):
    tails, shape, caps = case
    allowed = fraction**4 * error_of(tails, (0,) * len(tails))
    allowed = max(allowed, error_of(tails, caps))
    uniform = uniform_split(tails, shape, caps, allowed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_MAX_EXHAUSTIVE", 0)
        chosen = choose_bonds(tails, shape, caps, allowed)
        best = choose_bonds(tails, shape, caps, max_params=shape.num_params(uniform))
    assert shape.bond_dims(chosen) == chosen
    assert error_of(tails, chosen) <= allowed
    assert shape.num_params(best) <= shape.num_params(uniform)
    assert error_of(tails, best) <= error_of(tails, uniform)
    if error_of(tails, uniform) <= allowed:
        assert shape.num_params(chosen) <= shape.num_params(uniform)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_large_operators_do_better_than_with_equal_shares(shape, decay):
    rng = np.random.default_rng(0)
    caps = shape.bond_dims()
    spectra = [make_spectrum(decay, size, rng) for size in caps]
    tails = [squared_tails(spectrum / np.linalg.norm(spectrum)) for spectrum in spectra]
    allowed = 0.3**2
    uniform = uniform_split(tails, shape, caps, allowed)
    chosen = choose_bonds(tails, shape, caps, allowed)
    assert shape.bond_dims(chosen) == chosen
    assert error_of(tails, chosen) <= allowed
    assert shape.num_params(chosen) < shape.num_params(uniform)
    best = choose_bonds(tails, shape, caps, max_params=shape.num_params(uniform))
    assert shape.num_params(best) <= shape.num_params(uniform)
    assert error_of(tails, best) < error_of(tails, uniform)


def test_without_a_goal_the_bonds_are_the_caps():
    assert select_bonds(SPECTRA, SHAPE) == (16, 16)
    assert select_bonds(SPECTRA, SHAPE, max_bond=(3, 100)) == (3, 16)
    assert select_bonds([], MPOShape((3,), (2,)), rtol=0.1, max_params=6) == ()


def test_caps_win_over_an_error_and_zeros_are_always_cut():
    assert select_bonds(SPECTRA, SHAPE, rtol=0.0, max_bond=5) == (5, 5)
    zeros = [np.array([1.0, 0.5, 0, 0]), np.zeros(7)]
    assert select_bonds(zeros, SHAPE, rtol=0.0) == (2, 1)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.2, 1e300])
def test_only_the_relative_size_of_schmidt_values_counts(scale, rtol):
    scaled = [scale * spectrum for spectrum in SPECTRA]
    assert select_bonds(scaled, SHAPE, rtol=rtol) == select_bonds(SPECTRA, SHAPE, rtol=rtol)


@pytest.mark.parametrize("library", LIBRARIES)
def test_spectra_may_come_from_any_library(library):
    spectra = [to_library(spectrum, library) for spectrum in SPECTRA]
    assert select_bonds(spectra, SHAPE, rtol=0.01) == select_bonds(SPECTRA, SHAPE, rtol=0.01)
    assert bonds_by_entropy(spectra, SHAPE) == bonds_by_entropy(SPECTRA, SHAPE)


def test_spectra_may_come_from_another_library_in_low_precision():
    spectra = [torch.tensor(spectrum, dtype=torch.bfloat16) for spectrum in SPECTRA]
    assert select_bonds(spectra, SHAPE, rtol=0.01) == select_bonds(SPECTRA, SHAPE, rtol=0.01)
    assert bonds_by_entropy(spectra, SHAPE) == bonds_by_entropy(SPECTRA, SHAPE)


def test_exact_bonds_are_returned_when_nothing_contradicts_them():
    assert select_bonds(SPECTRA, SHAPE, bonds=[7, 4]) == (7, 4)
    wishes = {"max_bond": 7, "rtol": 0.01, "max_params": 624}
    assert select_bonds(SPECTRA, SHAPE, bonds=(7, 4), **wishes) == (7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bonds": (7,)}, r"one value per bond: got \(7,\) for 2 bonds"),
        ({"bonds": 7}, "one value per bond: got 7"),
        ({"bonds": (7, 0)}, "positive integer, got 0"),
        ({"bonds": (17, 5)}, r"the largest that fit are \(16, 5\)"),
        ({"bonds": (7, 4), "max_bond": 6}, r"bonds=\(7, 4\) exceed max_bond=6"),
        ({"bonds": (7, 4), "max_params": 623}, r"bonds=\(7, 4\) have 624 .* max_params=623"),
        ({"bonds": (6, 5), "rtol": 0.01}, r"bonds=\(6, 5\) may leave .* more than rtol=0.01"),
        ({"rtol": -0.1}, "rtol must be a finite number"),
        ({"max_params": 2.5}, "max_params must be a positive integer, got 2.5"),
        ({"max_params": 47}, r"max_params=47 is too few .* all bonds 1 it has 48 parameters"),
        ({"max_bond": 0}, "max_bond must be a positive integer"),
    ],
)
def test_contradictions_and_malformed_wishes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        select_bonds(SPECTRA, SHAPE, **arguments)


@pytest.mark.parametrize(
    ("spectra", "message"),
    [
        (SPECTRA[:1], "one array per bond: got 1 for 2 bonds"),
        ([SPECTRA[0], np.ones((2, 2))], r"bond 1 must be a non-empty 1-D array.*\(2, 2\)"),
        ([np.ones(0), SPECTRA[1]], "bond 0 must be a non-empty"),
        ([np.ones(3) * 1j, SPECTRA[1]], "dtype complex128"),
        ([np.array([1.0, -1e-3]), SPECTRA[1]], "bond 0 must be finite and nowhere negative"),
        ([np.array([np.nan, 1.0]), SPECTRA[1]], "bond 0 must be finite"),
        ([np.array([0.5, 1.0]), SPECTRA[1]], "bond 0 must be descending"),
    ],
)
@pytest.mark.parametrize("choose", [select_bonds, bonds_by_entropy])
def test_malformed_spectra_are_named(choose, spectra, message):
    with pytest.raises(InputError, match=message):
        choose(spectra, SHAPE)


def test_equal_schmidt_values_may_be_out_of_order_by_rounding():
    spectra = [np.array([1.0, 1.0 + 1e-15, 0.5]), np.ones(2)]
    assert select_bonds(spectra, SHAPE) == (3, 2)


@given(st.integers(1, 16), st.integers(1, 16), st.floats(1e-30, 1e30))
def test_entropy_counts_equal_schmidt_values(left, right, size):
    spectra = [size * np.append(np.ones(left), np.zeros(3)), np.full(right, size)]
    assert bonds_by_entropy(spectra, SHAPE) == SHAPE.bond_dims((left, right))
    assert bonds_by_entropy(spectra, SHAPE, max_bond=3) == SHAPE.bond_dims(
        (min(left, 3), min(right, 3))
    )


def test_entropy_of_a_product_operator_asks_for_bonds_of_one():
    product_operator = [np.array([3.0, 0, 0, 0]), np.array([3.0])]
    assert bonds_by_entropy(product_operator, SHAPE) == (1, 1)
    assert bonds_by_entropy([np.zeros(4), np.zeros(4)], SHAPE) == (1, 1)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_entropy_bonds_grow_with_the_scale_up_to_all_schmidt_values(scale, seed):
    spectra = [make_spectrum("random", 10, np.random.default_rng(seed)) for _ in range(2)]
    bonds = bonds_by_entropy(spectra, SHAPE, scale=scale)
    larger = bonds_by_entropy(spectra, SHAPE, scale=2 * scale)
    assert all(1 <= small <= large <= 10 for small, large in zip(bonds, larger, strict=True))
    assert bonds_by_entropy(spectra, SHAPE, scale=1e308) == (10, 10)


@pytest.mark.parametrize("scale", [0, -1.0, np.inf, np.nan, "1"])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(InputError, match="scale must be a finite number above 0"):
        bonds_by_entropy(SPECTRA, SHAPE, scale=scale)


@pytest.mark.parametrize("spell", [np.float32, np.int64, np.array, torch.tensor, Fraction, Decimal])
def test_limits_mean_the_same_however_they_are_spelled(spell):
    matrix = np.random.default_rng(0).normal(size=(16, 16))
    shape = MPOShape((4, 2, 2), (4, 2, 2))
    for rtol in (0, 1):
        expected = decompose(matrix, shape, rtol=float(rtol)).bond_dims
        assert decompose(matrix, shape, rtol=spell(rtol)).bond_dims == expected
    if spell in (np.int64, np.array, torch.tensor):
        expected = decompose(matrix, shape, max_bond=3, max_params=100).bond_dims
        limits = {"max_bond": spell(3), "max_params": spell(100)}
        assert decompose(matrix, shape, **limits).bond_dims == expected


@pytest.mark.parametrize(
    "rtol",
    [10**400, 10**5000, -(10**5000), 1j, b"1", np.True_, np.ones(2)],
    ids=lambda value: type(value).__name__,
)
def test_a_tolerance_that_is_none_is_told_in_a_line(rtol):
    with pytest.raises(InputError, match=r"^rtol must be a finite number of at least 0, got .*$"):
        select_bonds(SPECTRA, SHAPE, rtol=rtol)


@pytest.mark.parametrize("limit", [{"rtol": 0.2}, {"max_params": 40_000}], ids=str)
def test_sites_of_legs_of_1_add_nothing_to_the_search(limit, monkeypatch):
    searched, best = [], search._best_in_block
    monkeypatch.setattr(search, "_best_in_block", lambda *args: searched.append(1) or best(*args))
    counts = []
    for units in (0, 1, 20):
        legs = [leg for _ in range(9) for leg in (4, *(1,) * units)]
        shape = MPOShape(legs, [1] * len(legs))
        spectra = [0.8 ** np.arange(size) for size in shape.bond_dims(100)]
        bonds = select_bonds(spectra, shape, **limit)
        assert shape.bond_dims(bonds) == bonds
        assert "rtol" in limit or shape.num_params(bonds) <= limit["max_params"]
        counts.append(len(searched))
        searched.clear()
    assert max(counts[1:]) <= 3 * counts[0]


def test_the_work_of_a_search_grows_no_faster_than_the_bonds():
    blocks = [len(list(search._blocks(bonds))) for bonds in (25, 50, 100, 1000)]
    assert max(blocks) <= 24**2 + 3 * 1000
    assert blocks[1] <= 2 * blocks[0]
