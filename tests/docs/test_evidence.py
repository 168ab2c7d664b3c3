"""The evidence page says what the stored results say."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments.folder import read
from experiments.statistics import chosen, difference, values

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
RESULTS = {
    path.stem: read(path)["results"] for path in (ROOT / "experiments/results").glob("*.json")
}

# Setting, method, other method, and the page's verdict on the first: -1 better, 1 worse, 0 no
# clear difference.
STATEMENTS = [
    ("decoder", "moe", "dense", 0),
    ("decoder", "mpoe", "moe", 0),
    ("decoder", "moe-top2", "dense", -1),
    ("decoder", "mpoe-top2", "moe-top2", 1),
    ("decoder", "split-64-top2", "moe-top2", 1),
    ("decoder", "mpoe", "dense-wide", 1),
    ("decoder", "mpoe-top2", "dense-wide", 0),
    ("decoder", "split-64-top2", "dense-wide", 0),
    ("decoder", "mpoe-mask-0.25", "mpoe", 0),
    ("decoder", "mpoe-mask-0.5", "mpoe", 1),
    ("decoder", "mpoe-mask-0.9", "mpoe", 1),
    ("decoder", "mpoe-frozen", "mpoe", 1),
    ("decoder", "mpoe-slow-0.1", "mpoe", 1),
    ("decoder", "mpoe-half", "mpoe", 1),
    ("decoder", "mpoe-half", "dense", 1),
    ("decoder", "separate", "mpoe", 1),
    ("decoder", "share-rest", "mpoe", -1),
    ("decoder", "low-rank", "mpoe", 0),
    ("decoder", "mpoe-fresh", "mpoe", 1),
    ("decoder", "moe-fresh", "mpoe-fresh", -1),
    ("decoder", "mpoe-e2", "moe-e2", 0),
    ("decoder", "mpoe-e16", "moe-e16", 0),
    ("decoder", "mpoe-e32", "moe-e32", 0),
    ("decoder", "mpoe-e32", "mpoe", 0),
    ("decoder", "moe-e32", "moe", 0),
    ("decoder", "mpoe-e32", "dense", 0),
    ("decoder", "moe-e32", "dense", 0),
    ("decoder", "mpoe-e4", "moe-e4", 0),
    ("decoder", "split-64-mask-0.5", "split-64", 1),
    ("decoder", "split-64-owned-0.35", "split-64", 0),
    ("decoder", "mpoe-owned-0.35", "mpoe", 0),
    ("decoder", "mpoe-schmidt", "mpoe", 1),
    ("decoder", "split-64-schmidt", "split-64", 0),
    ("decoder", "mpoe-noise", "mpoe", 0),
    ("decoder", "moe-noise", "moe", 0),
    ("decoder", "mpoe-scaled", "mpoe", 1),
    ("decoder", "mpoe-owned-0.1", "mpoe", 0),
    ("decoder", "mpoe-owned-4", "mpoe", 1),
    ("decoder", "split-64-e2", "moe-e2", 1),
    ("decoder", "split-64-e4", "moe-e4", 1),
    ("decoder", "split-64-e16", "moe-e16", 0),
    ("decoder", "split-64-e32", "moe-e32", 0),
    ("smollm2", "moe", "dense", 1),
    ("smollm2", "split-64", "dense", 1),
    ("smollm2", "mpoe", "dense", 0),
    ("smollm2", "mpoe", "moe", 0),
    ("smollm2", "mpoe-mask-0.5", "mpoe", 0),
    ("minilm", "mpoe", "moe", 0),
    ("minilm", "mpoe", "dense", -1),
    ("minilm", "moe", "dense", 0),
    ("minilm", "split-64", "moe", 0),
    ("minilm", "moe-top2", "dense", 0),
    ("minilm", "mpoe-top2", "dense", -1),
    ("minilm", "mpoe-top2", "moe-top2", 0),
    ("minilm", "mpoe-mask-0.5", "mpoe", 1),
    ("minilm", "mpoe-top2", "mpoe", 0),
    ("minilm", "moe-top2", "moe", 0),
    ("minilm", "mpoe-frozen", "mpoe", 0),
    ("minilm", "mpoe", "dense-wide", 0),
    ("flan-t5", "split-64", "dense", 0),
    ("flan-t5", "mpoe-mask-0.5", "mpoe", 0),
    ("flan-t5", "mpoe", "moe", 0),
    ("flan-t5", "mpoe", "dense", 0),
    ("flan-t5", "moe", "dense", 0),
    ("t5", "moe", "dense", 0),
    ("t5", "mpoe", "dense", 0),
    ("t5", "split-64", "dense", 0),
    ("t5", "mpoe-mask-0.5", "mpoe", 0),
    ("t5", "moe-top2", "dense", -1),
    ("t5", "mpoe-top2", "moe-top2", 0),
    ("t5", "mpoe", "dense-wide", 0),
]


# Names of settings in the page's tables; a row without one is about the decoder.
SETTINGS = {
    "": "decoder",
    "MiniLM": "minilm",
    "SmolLM2-135M": "smollm2",
    "flan-t5-small": "flan-t5",
    "small T5": "t5",
}
VERDICTS = {-1: "better", 0: "no clear difference", 1: "worse"}
ROWS = re.findall(
    r"^\| (?:([\w -]+) \| )?`([\w.-]+)` \| `([\w.-]+)` \| ([+−][\d.]+) ± ([\d.]+) \| ([\w ]+) \|$",
    PAGE,
    re.M,
)


@pytest.mark.parametrize(("model", "method", "other", "mean", "width", "verdict"), ROWS)
def test_rows_are_those_of_the_results(model, method, other, mean, width, verdict):
    found = difference(RESULTS[SETTINGS[model]], method, other, "loss")
    assert float(mean.replace("−", "-")) == pytest.approx(found.mean, abs=0.00005001)
    assert float(width) == pytest.approx((found.high - found.low) / 2, abs=0.00005001)
    assert verdict == VERDICTS[int(found.low > 0) - int(found.high < 0)]


def test_every_statement_stands_in_a_table():
    rows = {(SETTINGS[model], method, other) for model, method, other, *_ in ROWS}
    assert {statement[:3] for statement in STATEMENTS} <= rows


@pytest.mark.parametrize(("setting", "method", "other", "sign"), STATEMENTS)
def test_statements_are_those_of_the_intervals(setting, method, other, sign):
    found = difference(RESULTS[setting], method, other, "loss")
    assert len(found.each) >= 3
    assert int(found.low > 0) - int(found.high < 0) == sign
    assert f"`{method}`" in PAGE
    assert f"`{other}`" in PAGE


def test_on_minilm_mixtures_with_a_shared_core_are_almost_as_good_as_the_ordinary_one():
    for method in ("mpoe", "split-64"):
        assert difference(RESULTS["minilm"], method, "moe", "loss").high < 0.01


def test_with_two_experts_a_small_t5_is_as_good_with_2_2_times_fewer_parameters():
    compared = difference(RESULTS["t5"], "mpoe-top2", "moe-top2", "loss")
    assert compared.high < 0.01
    sizes = {run["method"]: run["parameters"] for run in RESULTS["t5"]}
    assert sizes["moe-top2"] / sizes["mpoe-top2"] == pytest.approx(2.2, abs=0.05)
    gained = difference(RESULTS["t5"], "moe-top2", "dense", "loss").mean
    assert gained == pytest.approx(-0.007, abs=0.0005)


def test_on_minilm_accuracies_are_within_one_percent():
    names = {run["method"] for run in RESULTS["minilm"]}
    means = [np.mean([*values(RESULTS["minilm"], name, "accuracy").values()]) for name in names]
    assert len(means) == 9
    assert max(means) - min(means) < 0.01


def test_on_minilm_the_mask_costs_what_the_page_says():
    cost = difference(RESULTS["minilm"], "mpoe-mask-0.5", "mpoe", "loss").mean
    assert cost == pytest.approx(0.008, abs=0.0005)


def test_another_gauge_and_a_scaled_gradient_cost_what_the_page_says():
    worse = [
        difference(RESULTS["decoder"], name, "mpoe", "loss").mean
        for name in ("mpoe-schmidt", "mpoe-scaled")
    ]
    assert worse == pytest.approx([0.010, 0.005], abs=0.001)


def test_on_smollm2_the_split_layout_is_as_good_as_the_ordinary_mixture_and_all_gain():
    assert difference(RESULTS["smollm2"], "split-64", "moe", "loss").high < 0.01
    best = {name: values(RESULTS["smollm2"], name, "loss") for name in ("dense", "moe", "mpoe")}
    means = [sum(losses.values()) / 3 for losses in best.values()]
    assert max(means) - min(means) < 0.02
    before = {run["before"]["loss"] for run in RESULTS["smollm2"]}
    assert min(before) - sum(means) / 3 == pytest.approx(0.36, abs=0.005)


def test_the_grid_has_as_many_methods_as_the_page_says():
    assert len({run["method"] for run in RESULTS["decoder"]}) == 47


def test_methods_that_are_named_were_run():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    named = set(re.findall(r"`((?:dense|moe|mpoe|split|low|share|separate)[\w.-]*)`", prose))
    assert named
    for name in named:
        assert any(chosen(results, name) for results in RESULTS.values()), name


def test_shares_of_the_gain_are_those_of_the_means():
    gained = {
        name: -difference(RESULTS["decoder"], name, "dense", "loss").mean
        for name in ("moe-top2", "mpoe-top2", "split-64-top2")
    }
    assert gained["moe-top2"] == pytest.approx(0.1, abs=0.005)
    assert gained["mpoe-top2"] / gained["moe-top2"] == pytest.approx(1 / 4, abs=0.03)
    assert 0.42 < gained["split-64-top2"] / gained["moe-top2"] < 0.5


def test_a_mask_that_discards_more_updates_costs_more():
    worse = [
        difference(RESULTS["decoder"], name, "mpoe", "loss").mean
        for name in ("mpoe-mask-0.25", "mpoe-mask-0.5", "mpoe-mask-0.9", "mpoe-frozen")
    ]
    assert worse == sorted(worse)
    assert worse == pytest.approx([0.016, 0.035, 0.066, 0.073], abs=0.001)


def test_a_random_start_costs_what_the_page_says():
    lost = {
        kind: difference(RESULTS["decoder"], f"{kind}-fresh", kind, "loss").mean
        for kind in ("dense", "moe", "mpoe")
    }
    assert lost == pytest.approx({"dense": 0.057, "moe": 0.080, "mpoe": 0.168}, abs=0.001)


def test_steps_cost_what_the_page_says():
    costs = read(ROOT / "experiments/results/minilm.json")["costs"]
    ratios = {name: costs[name]["time_ratio"] for name in ("moe", "mpoe", "split-64")}
    assert ratios == pytest.approx({"moe": 1.4, "mpoe": 2.2, "split-64": 1.06}, rel=0.02)


def test_sizes_are_those_of_the_results():
    sizes = {run["method"]: run["parameters"] for run in RESULTS["decoder"]}
    assert sizes["moe-e32"] / sizes["mpoe-e32"] == pytest.approx(5.1, abs=0.05)
    assert sizes["share-rest"] / sizes["mpoe"] == pytest.approx(2.9, abs=0.05)
    assert values(RESULTS["decoder"], "mpoe", "loss").keys() == {0, 1, 2}
