"""Models whose experts have gates and ups in one projection: saved, loaded, and ordinary again."""

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.mixtures import logits, make, relative
from tnmoe import decompose_shared, hf
from tnmoe.hf.compress import _install
from tnmoe.hf.ordinary import find_ordinary
from tnmoe.hf.record import record_of

# Gates and ups lie one below the other in most, by turns and transposed in gpt-oss, and apart in
# tnmoe's own. The last two have biases, or may have.
NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "own")
CONFIG = hf.CompressionConfig(keep=0.9)


@torch.no_grad()
def fuse(model, form="whole"):
    """Give every mixture of a model experts with one projection for gates and ups."""
    pairs = []
    for each in find_ordinary(model):
        matrices, biases = each.matrices, each.biases
        both = torch.cat([matrices["gate"], matrices["up"]], 1)
        if form == "residual":
            both = decompose_shared(both, residual=True, max_bond=5)
        made = {"gate_up": both, "down": matrices["down"].clone()}
        if biases:
            made["gate_up_bias"] = torch.cat([biases["gate"], biases["up"]], 1)
            made["down_bias"] = biases["down"]
        made = each.format.experts_class.from_shared(**made, **each.settings())
        pairs.append((each, made))
    _install(model, CONFIG, pairs)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_the_same_and_becomes_the_ordinary_one_bit_for_bit(name):
    model = make(name)
    before, expected = (
        logits(model, name),
        {key: value.clone() for key, value in model.state_dict().items()},
    )
    small = fuse(model)
    assert relative(logits(small, name), before) < 1e-5
    ordinary = hf.to_moe(small)
    assert relative(logits(ordinary, name), before) < 1e-5
    if name != "own":  # whose ordinary mixture is of another class
        found = ordinary.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    ("name", "form"), [("mixtral", "whole"), *((name, "residual") for name in NAMES)]
)
def test_a_model_is_saved_and_loaded_and_a_folder_becomes_ordinary(name, form, tmp_path):
    small = fuse(make(name), form)
    expected = logits(small, name)
    for structures in record_of(small.config).compression.experts.values():
        assert {key: each.kind for key, each in structures.items()} == {
            "gate_up": "stacked" if form == "whole" else "residual",
            "down": "stacked",
        }
    small.save_pretrained(tmp_path / "small")
    names = load_file(tmp_path / "small" / "model.safetensors").keys()
    assert any(".experts.gate_up." in each for each in names)
    loaded = hf.from_pretrained(tmp_path / "small")
    assert relative(logits(loaded, name), expected) < 1e-6
    hf.prepare_export(tmp_path / "small", to="moe").run(tmp_path / "moe")
    ordinary = hf.to_moe(small)
    assert relative(logits(ordinary, name), expected) < 1e-5
    back = type(ordinary).from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(back.state_dict(), ordinary.state_dict(), rtol=0, atol=0)


def test_the_dense_model_of_an_upcycled_one_has_the_means_of_the_experts(tmp_path):
    model = make("own")
    means = [
        {name: stack.mean(0) for name, stack in each.matrices.items()}
        for each in find_ordinary(model)
    ]
    small = fuse(model)
    small.save_pretrained(tmp_path / "small")
    hf.prepare_export(tmp_path / "small", to="dense").run(tmp_path / "dense")
    dense = hf.average_experts(small)
    for model in (dense, type(dense).from_pretrained(tmp_path / "dense")):
        for layer, mean in zip(model.model.layers, means, strict=True):
            for name, matrix in mean.items():
                torch.testing.assert_close(getattr(layer.mlp, f"{name}_proj").weight, matrix)
