"""The page on adapters says what the stored results say."""

import json
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import t

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adapters-evidence.md").read_text(encoding="utf-8")


def stored(name):
    (file,) = (ROOT / "benchmarks/results/adapters").glob(f"{name}-*.json")
    return json.loads(file.read_text(encoding="utf-8"))


MINILM, LONGER, SMOLLM2 = stored("minilm"), stored("longer"), stored("smollm2")


def losses(report, method):
    return {
        each["seed"]: each["test"]["loss"] for each in report["results"] if each["method"] == method
    }


def difference(ours, theirs):
    """Return the mean of differences that are paired by seed, and half its 95 % interval."""
    assert set(ours) == set(theirs)
    found = [ours[seed] - theirs[seed] for seed in ours]
    return fmean(found), t.ppf(0.975, len(found) - 1) * stdev(found) / sqrt(len(found))


def test_runs_have_the_settings_that_the_page_describes():
    assert (MINILM["steps"], SMOLLM2["steps"], LONGER["steps"]) == (120, 40, 178)
    for report in (MINILM, LONGER, SMOLLM2):
        assert report["seeds"] == [0, 1, 2, 3, 4]
    assert "16 reviews of at most 32 tokens | 120 |" in PAGE
    assert "2 windows of 128 tokens | 40 |" in PAGE


def test_two_residual_experts_have_the_lowest_loss_at_equal_steps():
    means = {
        method: fmean(losses(MINILM, method).values())
        for method, about in MINILM["methods"].items()
        if "note" not in about
    }
    assert min(means, key=means.get) == "residual top-2"
    gain, half = difference(losses(MINILM, "residual top-2"), losses(MINILM, "LoRA"))
    assert (round(-gain, 3), round(half, 3)) == (0.016, 0.007)
    assert abs(means["residual top-4"] - means["residual top-2"]) < 0.001


def test_lora_is_as_good_or_better_at_equal_time():
    about = MINILM["methods"]["residual top-2"]
    slower = about["seconds"] / about["LoRA seconds"]
    assert slower == pytest.approx(LONGER["steps"] / MINILM["steps"], abs=0.02)
    gain, half = difference(losses(MINILM, "residual top-2"), losses(LONGER, "LoRA"))
    assert (round(gain, 3), round(half, 3)) == (0.013, 0.015)
    lora = MINILM["methods"]["LoRA"]["step bytes"]
    assert 1.7 < about["step bytes"] / lora < 2


def test_two_experts_lose_what_lora_loses_on_two_texts():
    gain, half = difference(losses(SMOLLM2, "residual top-2"), losses(SMOLLM2, "LoRA"))
    assert (round(gain, 3), round(half, 3)) == (0.001, 0.004)
    distances = [
        each["routing distance"]
        for each in SMOLLM2["results"]
        if each["method"] == "residual top-2"
    ]
    assert fmean(distances) == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("method", "least", "most"), [("hidden top-1", 0.03, 0.055), ("hidden top-2", 0.03, 0.055)]
)
def test_the_layout_hidden_is_worse_than_lora(method, least, most):
    gain, half = difference(losses(MINILM, method), losses(MINILM, "LoRA"))
    assert least < gain < most
    assert gain - half > 0


def test_one_expert_per_token_is_no_better_than_lora():
    gain, half = difference(losses(MINILM, "residual top-1"), losses(MINILM, "LoRA"))
    assert gain + half > 0


def test_five_seeds_do_not_tell_learned_from_random_routing():
    gain, half = difference(
        losses(MINILM, "residual top-2"), losses(MINILM, "residual top-2, random routing")
    )
    assert (round(-gain, 3), round(half, 3)) == (0.014, 0.016)
    distances = [
        each["routing distance"] for each in MINILM["results"] if each["method"] == "residual top-2"
    ]
    assert max(distances) < 0.1


@pytest.mark.parametrize("method", ["DoRA", "MPO of 2 sites", "MPO of 4 sites"])
def test_other_single_adapters_are_as_good_as_lora_and_take_more_time(method):
    gain, half = difference(losses(MINILM, method), losses(MINILM, "LoRA"))
    assert abs(gain) < half
    about = MINILM["methods"][method]
    assert about["seconds"] > 1.1 * about["LoRA seconds"]
