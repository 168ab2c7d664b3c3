"""The plan for experts: what it predicts follows from the work and the device."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tnmoe.contraction import rates as rates_module
from tnmoe.contraction.rates import Rates, get_rates, rates_path, set_rates

PAPER = tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
SPLIT = tn.MPOShape.split(3072, 768, left=64, right=64)
SHAPES = st.sampled_from([PAPER, SPLIT, tn.MPOShape.for_matrix(96, 64, 3)])
BONDS = st.sampled_from([None, 64, 8])
ZERO = '{"flops": 0, "half_depth": 1, "bandwidth": 1, "launch": 1}'
RATES = Rates(flops=1e11, half_depth=10, bandwidth=1e10, launch=5e-6)


@pytest.fixture
def rates(monkeypatch, tmp_path):
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rates_module, "_RATES", {})
    return tmp_path / "cache" / "rates-cpu.json"


def plan(shape, bond=None, rows=64, experts=8, device="cpu", **details):
    bonds = shape.bond_dims(bond)
    return tn.contraction_plan(shape, bonds, rows, experts=experts, device=device, **details)


@given(SHAPES, BONDS, st.integers(0, 5000), st.integers(1, 64), st.booleans())
def test_the_route_is_the_one_predicted_to_be_fastest(shape, bond, rows, experts, training):
    made = plan(shape, bond, rows, experts, training=training, cached=True)
    assert made.route == min(made.seconds, key=made.seconds.get)
    assert all(seconds > 0 for seconds in made.seconds.values()) or rows == 0
    assert ("cached" in made.seconds) == (not training)
    assert "cached" not in plan(shape, bond, rows, experts, training=training).seconds


@given(SHAPES, BONDS, st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 64))
def test_more_rows_and_training_never_cost_less(shape, bond, rows, more, experts):
    few, many = (plan(shape, bond, n, experts, cached=True) for n in (rows, rows + more))
    training = plan(shape, bond, rows, experts, training=True)
    for route in ("joint", "rebuilt", "cached"):
        assert many.seconds[route] >= few.seconds[route] * (1 - 1e-9)
    for route in ("joint", "rebuilt"):
        assert training.seconds[route] > few.seconds[route]


@pytest.mark.parametrize(
    "slower", [{"flops": 5e10}, {"half_depth": 20}, {"bandwidth": 5e9}, {"launch": 1e-5}]
)
@pytest.mark.parametrize("shape", [PAPER, SPLIT])
def test_a_slower_device_is_predicted_to_take_longer(rates, slower, shape):
    def seconds(device):
        set_rates("cpu", device)
        # Four rows of bond 4: every one of the routes is open.
        return plan(shape, 4, rows=4, cached=True).seconds

    before, after = seconds(RATES), seconds(replace(RATES, **slower))
    assert set(before) == {"joint", "per_expert", "rebuilt", "cached"}
    assert all(after[route] >= before[route] for route in before)
    assert any(after[route] > before[route] for route in before)


def test_operations_are_those_of_the_products():
    rows, experts = 640, 4
    # Enough rows that every expert gets some.
    shared = plan(SPLIT, rows=rows, experts=experts, training=True)
    assert shared.route == "joint"
    right, center_site, left = 12 * 64 * 64, 3072 * 768, 48 * 64 * 64
    assert shared.flops == 2 * rows * (right + center_site + left)
    dense = plan(PAPER, rows=rows, experts=experts, training=True)
    assert dense.route == "rebuilt"
    building = 192 * 192 * 8 * 4 * 384 + 192 * 8 * 4 * 384 * 24 * 16
    assert dense.flops == 2 * (experts * building + rows * 3072 * 768)
    assert dense.peak_elements == 3072 * 768


def test_few_rows_of_small_bonds_are_never_worth_a_matrix():
    assert plan(PAPER, 4, rows=1, training=True).route == "per_expert"
    assert plan(PAPER, rows=16384, training=True).route == "rebuilt"
    assert plan(PAPER, rows=16384, cached=True).route == "cached"


def test_a_printed_plan_ranks_the_routes():
    lines = str(plan(PAPER, rows=512, cached=True)).splitlines()
    assert lines[0].startswith("route cached: ")
    ranking = [line.split() for line in lines[3:]]
    assert ranking[0][0] == "cached"
    assert [float(ms) for _, ms in ranking] == sorted(float(ms) for _, ms in ranking)


def test_measured_rates_are_stored_and_broken_files_ignored(rates, monkeypatch):
    typical = get_rates("cpu")
    set_rates("cpu", RATES, store=True)
    assert rates_path("cpu") == rates
    set_rates("cuda", replace(RATES, launch=1.0), store=True)
    monkeypatch.setattr(rates_module, "_RATES", {})  # as in another process
    assert get_rates("cpu") == RATES
    assert get_rates("cuda").launch == 1.0
    assert sorted(os.listdir(rates.parent)) == ["rates-cpu.json", "rates-cuda.json"]
    for broken in ("", "[]", "{}", '{"flops": 1}', "3", ZERO):
        rates.write_text(broken)
        monkeypatch.setattr(rates_module, "_RATES", {})
        assert get_rates("cpu") == typical


def test_rates_that_are_not_stored_hold_for_this_process_only(rates):
    set_rates("cpu", RATES)
    assert get_rates("cpu") == RATES
    assert not rates.exists()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1"])
def test_rates_that_no_device_has_are_refused(value):
    with pytest.raises(tn.InputError, match=r"bandwidth must be in \(0, inf\)"):
        replace(RATES, bandwidth=value)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"experts": 0}, "experts must be a positive integer"),
        ({"center_site": 5}, "center_site must be an integer from 0 to 4"),
        ({"rows": -1}, "batch must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input_of_experts_is_named(details, message):
    with pytest.raises(tn.InputError, match=message):
        plan(PAPER, **details)


@pytest.mark.parametrize("experts", [None, 4])
@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"batch": -1}, "batch must be an integer of at least 0, got -1"),
        ({"batch": 1.5}, "batch must be an integer of at least 0, got 1.5"),
        ({"center_site": 9}, "center_site must be an integer from 0 to 1, got 9"),
        ({"bond_dims": (0,)}, "every bond dimension must be a positive integer, got 0"),
        ({"bond_dims": (2, 2)}, "one value per bond"),
    ],
)
def test_bad_input_is_named_with_and_without_experts(details, message, experts):
    with pytest.raises(tn.InputError, match=message):
        tn.contraction_plan(tn.MPOShape((2, 2), (2, 2)), experts=experts, **details)
