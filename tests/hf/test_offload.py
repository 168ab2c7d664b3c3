"""Models with offloaded tensors compute the same as in memory."""

import copy
from itertools import product

import accelerate
import pytest
import torch
import transformers as tf
from torch.nn.utils import parametrize

from tests.hf.families import IDS, MASK
from tnmoe import InputError, hf, nn

_SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
DENSE = {
    "gated": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL)),
    "with biases": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4)
    ),
    "encoder-decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
}
LAYOUTS = {
    "interleaved": {"sites": 3},
    "split": {"layout": "split"},
    "hidden": {"layout": "hidden"},
    "residual": {"layout": "residual"},
    "residual, shared biases": {"layout": "residual", "common_bias": True},
    "two matrices": {"layout": "hidden", "bond_ratio": 2.0},
    "dense": {"layout": "dense"},
    "nothing shared": {"sites": 3, "shared_sites": "none"},
    "shared biases": {"sites": 3, "common_bias": True},
    "one matrix": {"sites": 3, "matrices": ["down"]},
    "load bias": {"sites": 3, "router": {"score_function": "sigmoid", "load_bias": True}},
    "noisy": {"sites": 3, "router": {"noisy": True, "bias": True}},
    "expert choice": {"sites": 3, "router_kind": "expert_choice"},
}


def convert(kind="gated", layout="interleaved", route=None):
    torch.manual_seed(0)
    model = hf.upcycle(DENSE[kind](), hf.MPOEConfig(num_experts=4, **LAYOUTS[layout])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name or ".experts." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return set_route(model, route)


def set_route(model, route):
    for module in model.modules():
        if isinstance(module, nn.MPOProjection):
            module.route = route
    return model


@torch.no_grad()
def logits(model):
    given = {"input_ids": IDS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS
    return model(**given).logits


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("gated", layout) for layout in LAYOUTS),
        *product(list(DENSE)[1:], ("interleaved", "hidden", "residual", "load bias")),
    ],
)
def test_tensors_kept_elsewhere_give_the_same_logits(kind, layout, tmp_path):
    model = convert(kind, layout)
    expected, buffers = logits(model), layout == "load bias"
    on_cpu = accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
    for _ in range(2):
        torch.testing.assert_close(logits(on_cpu), expected)
    model = convert(kind, layout)
    on_disk = accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=buffers)
    assert any(each.is_meta for each in on_disk.parameters())
    torch.testing.assert_close(logits(on_disk), expected)


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", "cached"])
@pytest.mark.parametrize(
    "layout", ["interleaved", "split", "hidden", "residual", "two matrices", "nothing shared"]
)
def test_every_route_works_with_tensors_kept_elsewhere(layout, route):
    model = convert("gated", layout, route)
    expected = logits(model)
    torch.testing.assert_close(logits(accelerate.cpu_offload(model, torch.device("cpu"))), expected)


@pytest.mark.parametrize("places", [("cpu", "disk"), ("disk", "cpu"), ("disk", "disk")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_map_may_put_layers_on_disk(layout, places, tmp_path):
    model = convert("gated", layout)
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
        "lm_head": "cpu", "model.layers.0": places[0], "model.layers.1": places[1],
    }  # fmt: skip
    loaded = hf.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.hf_device_map["model.layers.1"] == places[1]
    for _ in range(2):
        torch.testing.assert_close(logits(loaded.eval()), expected)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(hf.from_pretrained(tmp_path / "again")), expected)
    torch.testing.assert_close(
        loaded.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
    )


def test_a_device_map_may_cut_a_layer_in_two(tmp_path):
    model = convert()
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    device_map = {
        name: "disk" if ".experts." in name or ".router" in name else "cpu"
        for name, module in model.named_modules()
        if not list(module.children())
    }
    loaded = hf.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(loaded.eval()), expected)


def test_tied_and_parametrized_cores_may_be_kept_elsewhere():
    model = convert()
    layers = [each for each in model.modules() if isinstance(each, nn.MPOMoE)]
    nn.tie_layers(layers)
    for layer in layers:
        last = layer.experts.up.shape.sites - 1
        layer.experts.gate.set_core(last, layer.experts.up.core_at(last))
        parametrize.register_parametrization(layer.experts.down, "aux_0", torch.nn.Tanh())
    for route in ("joint", None):
        expected = logits(set_route(model, route))
        offloaded = accelerate.cpu_offload(set_route(copy.deepcopy(model), route), "cpu")
        torch.testing.assert_close(logits(offloaded), expected)


def test_what_reads_a_whole_model_says_that_some_of_it_is_elsewhere():
    converted = accelerate.cpu_offload(convert(), torch.device("cpu"))
    dense = accelerate.cpu_offload(DENSE["gated"](), torch.device("cpu"))
    for call, planner in (
        (lambda: hf.to_moe(converted), "prepare_export"),
        (lambda: hf.average_experts(converted), "prepare_export"),
        (lambda: hf.upcycle(dense, hf.MPOEConfig(num_experts=4, sites=3)), "prepare_upcycle"),
    ):
        with pytest.raises(InputError, match=f"not in memory, .*embed_tokens.*{planner}"):
            call()
