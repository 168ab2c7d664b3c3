"""The sizes that the benchmarks state, counted again and compared with transformers' classes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.paper_sizes import CASES, MODELS, measure
from tnmoe import hf

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_page_and_the_stored_figures_are_what_is_counted(case):
    row = measure(*case)
    assert row in json.loads((FOLDER / "results" / "paper_sizes.json").read_text())
    name, experts, every = case
    counts = [f"{row[key]:,}" for key in ("dense", "moe")]
    for layout in ("interleaved", "split"):
        counts += [f"{row[layout]:,}", f"{row[f'{layout} ratio']:.2f}"]
    line = f"| {name} | {experts} | {['1st', '2nd'][every - 1]} | {' | '.join(counts)} |"
    assert line in (FOLDER / "README.md").read_text()


def test_the_published_switch_base_is_the_ordinary_mixture_of_128_in_every_second_network():
    config = transformers.SwitchTransformersConfig(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12,
        num_heads=12, num_experts=128, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
    )  # fmt: skip
    with torch.device("meta"):
        switch = transformers.SwitchTransformersForConditionalGeneration(config)
    count = sum(each.numel() for each in switch.parameters())
    report = hf.parameter_report(MODELS["T5-base"], hf.MPOEConfig(num_experts=128, every=2))
    assert count == report.total.moe == 7_415_217_408
