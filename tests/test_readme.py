"""The README: its examples run as they stand, and its length and its figures are right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.folder import read
from experiments.statistics import difference

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
MOST_WORDS = 500  # what a visitor reads in two minutes

EXAMPLES = dict(
    zip(
        ("numpy", "torch", "hf"),
        re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S),
        strict=True,
    )
)
# Rows of the table of evidence, and the methods of the experiment that they name.
METHODS = {
    "dense": "dense",
    "wider dense": "dense-wide",
    "MPOE": "mpoe-top2",
    "MPOE, split layout": "split-64-top2",
    "ordinary mixture": "moe-top2",
}


def test_the_readme_is_short():
    assert len(TEXT.split()) <= MOST_WORDS


def test_the_numpy_example_does_without_torch():
    assert "torch" not in EXAMPLES["numpy"]


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example_runs_and_prints_what_its_comments_say(code, tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    promises = re.findall(r"print\(.*\)  # (.+) …$", code, re.M)
    assert promises
    assert all(promise in process.stdout for promise in promises)


def test_figures_are_those_of_the_experiment():
    stored = read(ROOT / "experiments/results/decoder.json")
    sizes = {each["method"]: each["parameters"] for each in stored["results"]}
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.M)
    assert [name for name, *_ in rows] == list(METHODS)
    times = {"dense": 1.0} | {name: cost["time_ratio"] for name, cost in stored["costs"].items()}
    for name, size, gain, time in rows:
        method = METHODS[name]
        assert int(size.replace(",", "")) == sizes[method]
        lower = -difference(stored["results"], method, "dense", "loss").mean
        assert float(gain) == pytest.approx(lower, abs=0.0005)
        assert float(time) == pytest.approx(times[method], abs=0.005)
