"""The evidence page says what the stored results say."""

import re
from pathlib import Path

import pytest

from experiments.folder import read
from experiments.statistics import chosen, difference

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
RESULTS = read(ROOT / "experiments/results/decoder.json")["results"]

# Method, other method, and what the page says of the first: -1 better, 1 worse, 0 not told apart.
STATEMENTS = [
    ("moe", "dense", 0),
    ("mpoe", "moe", 0),
    ("moe-top2", "dense", -1),
    ("mpoe-top2", "moe-top2", 1),
    ("split-64-top2", "moe-top2", 1),
    ("mpoe", "dense-wide", 1),
    ("mpoe-top2", "dense-wide", 0),
    ("split-64-top2", "dense-wide", 0),
    ("mpoe-mask-0.5", "mpoe", 1),
    ("mpoe-half", "mpoe", 1),
    ("mpoe-half", "dense", 1),
    ("split-64-owned-0.35", "split-64", 0),
    ("mpoe-owned-0.35", "mpoe", 0),
]


@pytest.mark.parametrize(("method", "other", "sign"), STATEMENTS)
def test_statements_are_those_of_the_intervals(method, other, sign):
    found = difference(RESULTS, method, other, "loss")
    assert len(found.each) >= 3
    assert int(found.low > 0) - int(found.high < 0) == sign
    assert f"`{method}`" in PAGE
    assert f"`{other}`" in PAGE


def test_methods_that_are_named_were_run():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    named = set(re.findall(r"`((?:dense|moe|mpoe|split|low|share|separate)[\w.-]*)`", prose))
    assert named
    for name in named:
        assert chosen(RESULTS, name), name


def test_shares_of_the_gain_are_those_of_the_means():
    gained = {
        name: -difference(RESULTS, name, "dense", "loss").mean
        for name in ("moe-top2", "mpoe-top2", "split-64-top2")
    }
    assert gained["moe-top2"] == pytest.approx(0.1, abs=0.005)
    assert gained["mpoe-top2"] / gained["moe-top2"] == pytest.approx(1 / 4, abs=0.03)
    assert 0.42 < gained["split-64-top2"] / gained["moe-top2"] < 0.5
