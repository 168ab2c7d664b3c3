"""The page on compression says what the stored results say."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compression-evidence.md").read_text(encoding="utf-8")


def stored(name):
    (file,) = (ROOT / "benchmarks/results/compression").glob(f"{name}-*.json")
    return json.loads(file.read_text(encoding="utf-8"))["models"]


RUNS, MEDIUM = stored("small"), stored("medium")
SHARES = (0.8, 0.75, 0.6, 0.5, 0.25)


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("compression_tables")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def loss(tables):
    """Return a function of method and share: the mean increase of the loss."""

    def mean(method, share=1.0, kind="loss", runs=RUNS):
        found = tables.increases(runs, method, share, kind)
        return sum(found) / len(found)

    return mean


def test_every_run_is_of_the_model_that_the_page_describes():
    for run in RUNS:
        size = run["size"]
        assert (size["layers"], size["hidden"], size["intermediate"]) == (4, 128, 256)
        assert (size["experts"], size["top_k"]) == (8, 2)
    assert sorted(run["seed"] for run in RUNS) == [0, 1]
    (run,) = MEDIUM
    size = run["size"]
    assert (size["layers"], size["hidden"], size["intermediate"]) == (4, 192, 384)
    assert (size["experts"], size["top_k"]) == (16, 2)


OTHERS = ("unit pruning", "SVD, whitened", "SVD", "D²-MoE", "MPO", "REAP", "HC-SMoE")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("runs", [RUNS, MEDIUM], ids=["small", "medium"])
def test_at_equal_numbers_the_librarys_compression_loses_least(tables, loss, runs, share):
    _, rows = tables.by_numbers(runs)
    others = [row[0] for row in rows if row[0] != "tnmoe"]
    assert set(OTHERS) < set(others)
    # Nothing that the tables show: differences below half a thousandth.
    assert all(
        loss("tnmoe", share, runs=runs) < loss(other, share, runs=runs) + 5e-5 for other in others
    )
    assert rows[0][0] == "tnmoe"


def test_the_distances_are_those_of_the_summary(loss):
    assert "a sixth to two thirds of what pruning of hidden units loses" in PAGE
    assert "a quarter or less of what a truncated SVD loses" in PAGE
    for runs in (RUNS, MEDIUM):
        for share in (0.6, 0.5, 0.25):
            own = loss("tnmoe", share, runs=runs)
            assert 0.16 < own / loss("unit pruning", share, runs=runs) < 0.67
            assert own / loss("SVD, whitened", share, runs=runs) < 0.25
    own, pruned = (loss(name, 0.25, runs=MEDIUM) for name in ("tnmoe", "unit pruning"))
    assert "a fifth of what pruned units do" in PAGE
    assert 0.18 < own / pruned < 0.22


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_medium_model_loses_less(loss, share):
    names = ["tnmoe", "tnmoe hidden", "tnmoe residual", "unit pruning", "SVD, whitened", "D²-MoE"]
    for method in names:
        assert loss(method, share, runs=MEDIUM) < loss(method, share)


def test_after_healing_low_ranks_and_pruned_units_are_close(loss):
    healed = {
        (method, share): loss(method, share, "healed")
        for method in ("tnmoe", "unit pruning", "SVD, whitened", "D²-MoE", "REAP", "HC-SMoE")
        for share in (0.75, 0.5, 0.25)
    }
    assert healed["tnmoe", 0.25] < 0.85 * healed["unit pruning", 0.25]
    for share in (0.75, 0.5):
        assert abs(healed["tnmoe", share] - healed["unit pruning", share]) < 0.002
    for (method, share), value in healed.items():
        if method not in ("tnmoe", "unit pruning"):
            assert value > (2.5 if share == 0.25 else 3) * healed["tnmoe", share]
    for method in ("REAP", "HC-SMoE"):
        for share in (0.75, 0.5, 0.25):
            assert healed[method, share] < loss(method, share) / 2
            assert healed[method, share] > healed["tnmoe", share]


def test_rounding_alone_is_unbeaten_down_to_a_quarter_of_the_bytes(tables, loss):
    assert abs(loss("int8")) < 0.0005
    assert round(loss("GPTQ 4"), 3) == 0.003
    for case in RUNS[0]["cases"]:
        if 0.25 < case["bytes"] < 0.45:
            assert loss(case["method"], case["share"]) > loss("GPTQ 4") - 1e-9


def test_at_a_fifth_and_a_seventh_of_the_bytes_methods_are_as_the_page_says(loss):
    fifth = loss("unit pruning, GPTQ 4", 0.75)
    assert fifth < loss("GPTQ 3")
    assert fifth < loss("tnmoe, GPTQ 3", 0.9) < 2 * fifth
    for runs in (RUNS, MEDIUM):
        seventh = loss("tnmoe, GPTQ 3", 0.6, runs=runs)
        for pruned in (("unit pruning, GPTQ 3", 0.6), ("unit pruning, GPTQ 4", 0.5)):
            assert 0.25 < seventh / loss(*pruned, runs=runs) < 0.67
        assert 0.2 < seventh / loss("GPTQ 2", runs=runs) < 0.4
    eighth = loss("tnmoe, GPTQ 4", 0.4, runs=MEDIUM)
    assert 0.009 < eighth < 0.012


def test_experts_of_the_upcycled_model_hardly_differ_and_merge_without_a_loss():
    (run,) = stored("smollm2-amd")
    assert "at 1.4 % of their norm from their mean" in PAGE
    assert round(100 * max(run["probe"]["distance"].values()), 1) == 1.4
    losses = {(case["method"], case["share"]): case["loss"] for case in run["cases"]}
    assert losses["HC-SMoE", 0.25] < losses["original", 1.0]
    assert run["size"]["layers"] == 30
    assert run["size"]["steps"] == 150
    assert run["size"]["windows"] * run["size"]["window"] == 1024


def test_where_experts_can_be_spared_removing_them_loses_least(loss):
    runs = stored("smollm2-redrawn")
    (run,) = runs
    assert (run["size"]["redrawn"], run["size"]["mixed"], run["size"]["steps"]) == (0.5, 6, 300)
    assert all(round(each, 2) == 0.81 for each in run["probe"]["distance"].values())
    assert round(run["probe"]["random routing"], 2) == 0.42
    removed = [each for layer in run["probe"]["without one"] for each in layer if each is not None]
    assert max(map(abs, removed)) < 0.01
    order = {
        0.75: ("REAP", "unit pruning", "tnmoe", "D²-MoE", "SVD, whitened"),
        0.5: ("REAP", "unit pruning", "D²-MoE", "tnmoe", "SVD, whitened"),
    }
    for share, names in order.items():
        found = [loss(name, share, runs=runs) for name in names]
        assert found == sorted(found)
        own = found[names.index("tnmoe")]
        assert 0.2 < found[0] / own < 0.5
        assert 0.5 < found[1] / own < 0.62
    errors = {(case["method"], case["share"]): case["activations"] for case in run["cases"]}
    assert 0.6 < errors["tnmoe", 0.5] / errors["D²-MoE", 0.5] < 0.7
    before = {case["method"]: case["loss"] for case in run["cases"]}["original"]
    assert round(before, 2) == 3.49


def test_tensor_trains_of_three_sites_lose_a_hundred_times_as_much(loss):
    assert "rises a hundred times as much" in PAGE
    assert 95 < loss("MPO", 0.5) / loss("tnmoe", 0.5) < 105


def test_every_method_of_the_tables_is_explained(tables):
    names = {row[0] for row in tables.by_numbers(RUNS)[1]}
    explained = PAGE[PAGE.index("| name | method |") :]
    assert all(re.search(re.escape(name.split(",")[0]), explained) for name in names)
