"""The page on compression says what the stored results say."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compression-evidence.md").read_text(encoding="utf-8")
(RESULTS,) = (ROOT / "benchmarks/results/compression").glob("quality-*.json")
RUNS = json.loads(RESULTS.read_text(encoding="utf-8"))["models"]
SHARES = (0.8, 0.75, 0.6, 0.5, 0.25)


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("compression_tables")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def loss(tables):
    """Return a function of method and share: the mean increase of the loss."""

    def mean(method, share=1.0):
        found = tables.increases(RUNS, method, share)
        return sum(found) / len(found)

    return mean


def test_every_run_is_of_the_model_that_the_page_describes():
    for run in RUNS:
        size = run["size"]
        assert (size["layers"], size["hidden"], size["intermediate"]) == (4, 128, 256)
        assert (size["experts"], size["top_k"]) == (8, 2)
    assert "There are two seeds of one size" in PAGE
    assert sorted(run["seed"] for run in RUNS) == [0, 1]


@pytest.mark.parametrize("share", SHARES)
def test_at_equal_numbers_the_librarys_compression_loses_least(tables, loss, share):
    _, rows = tables.by_numbers(RUNS)
    others = [row[0] for row in rows if row[0] != "tnmoe"]
    assert len(others) >= 10
    assert all(loss("tnmoe", share) < loss(other, share) for other in others)
    assert rows[0][0] == "tnmoe"


def test_the_distances_are_those_of_the_summary(loss):
    assert "half to two thirds of what pruning of hidden units loses" in PAGE
    assert "a quarter to a fifteenth of what a truncated SVD loses" in PAGE
    pruned = [loss("tnmoe", share) / loss("unit pruning", share) for share in SHARES]
    truncated = [loss("tnmoe", share) / loss("SVD, whitened", share) for share in SHARES]
    assert 0.35 < min(pruned) <= max(pruned) < 0.67
    assert 1 / 16 < min(truncated) <= max(truncated) < 0.25


def test_rounding_alone_is_unbeaten_down_to_a_quarter_of_the_bytes(tables, loss):
    assert abs(loss("int8")) < 0.0005
    assert max(loss("int4"), loss("GPTQ 4")) < 0.005
    for case in RUNS[0]["cases"]:
        if 0.25 < case["bytes"] < 0.45:
            assert loss(case["method"], case["share"]) > loss("GPTQ 4") - 1e-9
    names = [row[1] for row in tables.by_bytes(RUNS)[1]]
    assert names[-2:] == ["tnmoe, GPTQ 4", "unit pruning, int4"]


def test_at_a_fifth_and_a_seventh_of_the_bytes_methods_are_close_as_the_page_says(loss):
    fifth = [loss("unit pruning, int4", 0.75), loss("GPTQ 3"), loss("tnmoe, GPTQ 4", 0.75)]
    assert min(fifth) == fifth[0]
    assert max(fifth) < 2 * fifth[0]
    seventh = [loss("unit pruning, int4", 0.5), loss("tnmoe, GPTQ 4", 0.5)]
    assert max(seventh) < 0.6 * loss("GPTQ 2")


def test_tensor_trains_of_three_sites_lose_nearly_a_hundred_times_as_much(loss):
    assert "nearly a hundred times" in PAGE
    assert 90 < loss("MPO", 0.5) / loss("tnmoe", 0.5) < 100


def test_every_method_of_the_tables_is_explained(tables):
    names = {row[0] for row in tables.by_numbers(RUNS)[1]}
    explained = PAGE[PAGE.index("| name | method |") :]
    assert all(re.search(re.escape(name.split(",")[0]), explained) for name in names)
