"""Networks are found once each, and chosen by name, number and distance."""

import pytest

from tests.hf.families import make, outputs, relative
from tnmoe import hf, nn

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)


def moes(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.MPOMoE)}


def test_a_network_in_two_places_becomes_one_mixture_in_both():
    model = make("llama")
    layers = model.model.layers
    layers[2].mlp = layers[0].mlp
    expected = outputs(model, "llama")
    assert [ffn.name for ffn in hf.find_ffns(model)] == ["model.layers.0", "model.layers.1"]
    hf.upcycle(model, CONFIG)
    assert layers[2].mlp is layers[0].mlp
    assert isinstance(layers[2].mlp, nn.MPOMoE)
    assert relative(outputs(model, "llama"), expected) < 1e-5


@pytest.mark.parametrize(
    ("layers", "every", "expected"),
    [
        (None, 2, ["encoder.block.1", "decoder.block.0", "decoder.block.2"]),
        ("encoder", 1, ["encoder.block.0", "encoder.block.1", "encoder.block.2"]),
        ("decoder", 3, ["decoder.block.2"]),
        (r"block\.(0|2)\.", 1, [f"{s}coder.block.{n}" for s in ("en", "de") for n in (0, 2)]),
        ([5, 0], 1, ["encoder.block.0", "decoder.block.2"]),
    ],
)
def test_layers_are_chosen_by_name_number_and_distance(layers, every, expected, tmp_path):
    model = make("t5")
    dense = outputs(model, "t5")
    config = hf.MPOEConfig(num_experts=2, sites=3, layers=layers, every=every)
    report = hf.parameter_report(model.config, config)
    hf.upcycle(model, config)
    assert [name.split(".layer")[0] for name in moes(model)] == expected
    assert [each.name.split(".layer")[0] for each in report.ffns] == expected
    assert report.total.mpoe == sum(p.numel() for p in model.parameters())
    assert relative(outputs(model, "t5"), dense) < 1e-5
    model.save_pretrained(tmp_path)
    assert list(moes(hf.from_pretrained(tmp_path))) == list(moes(model))
