"""A report counts the parameters that real models have."""

import json

import pytest
import transformers

from tests.hf.families import LAYOUTS, MODELS, make
from tnmoe import hf, nn


@pytest.mark.parametrize("name", ["bert", "llama with biases"])
@pytest.mark.parametrize(
    "options",
    [*LAYOUTS.values(), {"layout": "hidden", "max_bond": 3}, {"max_bond": 3}, {"layers": [1]}],
)
def test_the_report_counts_what_really_built_models_hold(name, options):
    config = hf.MPOEConfig(num_experts=3, **options)
    report = hf.parameter_report(make(name).config, config)
    from_model = hf.parameter_report(make(name), config)
    # The configuration alone is laid out as the bare model, whose layers have shorter names.
    assert [(c.dense, c.moe, c.mpoe) for c in report.ffns] == [
        (c.dense, c.moe, c.mpoe) for c in from_model.ffns
    ]
    assert from_model.total.dense == sum(p.numel() for p in make(name).parameters())
    mpoe = hf.upcycle(make(name), config)
    assert from_model.total.mpoe == sum(p.numel() for p in mpoe.parameters())
    moe = hf.upcycle(
        make(name), hf.MPOEConfig(**{**config.to_dict(), "layout": "dense", "shapes": {}})
    )
    assert from_model.total.moe == sum(p.numel() for p in moe.parameters())
    layers = [m for m in mpoe.modules() if isinstance(m, nn.MPOMoE)]
    assert [c.mpoe for c in from_model.ffns] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers
    ]
    assert json.loads(json.dumps(from_model.to_dict()))["total"]["mpoe"] == from_model.total.mpoe
    assert f"{from_model.total.mpoe:,}" in str(from_model)


def test_the_report_of_a_huge_configuration_takes_no_memory():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, architectures=["LlamaModel"]
    )
    report = hf.parameter_report(config, hf.MPOEConfig(num_experts=64))
    assert report.ffns[0].dense == 3 * 8192 * 28672
    assert report.ffns[0].moe == 64 * report.ffns[0].dense + 64 * 8192


@pytest.mark.parametrize("name", ["phi3", "modernbert", "albert", "bloom", "bamba"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_counts_fused_and_repeated_networks_once(name, layout):
    config = hf.MPOEConfig(num_experts=3, **LAYOUTS[layout])
    model = make(name)
    report = hf.parameter_report(model, config)
    assert len(report.ffns) == MODELS[name][1]
    assert report.total.dense == sum(p.numel() for p in model.parameters())
    assert report.total.mpoe == sum(p.numel() for p in hf.upcycle(model, config).parameters())
