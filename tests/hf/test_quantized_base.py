"""Adapters of routed experts beside a base in few bits: it stays as it is, and is held once."""

import itertools

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import tnmoe as tn
from tests.hf.families import IDS
from tnmoe import hf

LAYOUTS = {"residual": {}, "hidden": {"group_size": 16}}


class FourBits(nn.Linear):
    """A linear module with packed weights, as bitsandbytes has them: no matrix of its size."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 7, requires_grad=False)
        codes = (weight / self.scale).round().clamp(-8, 7).to(torch.uint8).flatten()
        packed = (codes[::2] << 4) | (codes[1::2] & 15)
        self.weight = nn.Parameter(packed[:, None], requires_grad=False)
        self.compute_dtype = linear.weight.dtype

    def forward(self, rows):
        codes = torch.stack([self.weight >> 4, self.weight & 15], -1).flatten().to(torch.int8)
        codes = torch.where(codes > 7, codes - 16, codes).view(self.out_features, -1)
        return nn.functional.linear(rows, (codes * self.scale).to(rows.dtype))


def in_four_bits(model):
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, FourBits(getattr(layer.mlp, name)))
    return model


def in_eight_bits(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
    return model


QUANTIZED = {"four bits": in_four_bits, "torchao int8": in_eight_bits}


def make(kind):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return QUANTIZED[kind](tf.LlamaForCausalLM(config).eval())


def storages(tensors):
    """Return the bytes of what tensors are made of, each once."""
    found = {}
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names = tensor.__tensor_flatten__()[0]
            found |= storages(getattr(tensor, name) for name in names)
        else:
            memory = tensor.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return found


def held(model):
    return sum(storages(itertools.chain(model.parameters(), model.buffers())).values())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_base_stays_and_is_held_once(kind, layout, tmp_path):
    model = make(kind)
    before, size = logits(model), held(model)
    config = hf.MPOEAdapterConfig(num_experts=3, layout=layout, **LAYOUTS[layout])
    model = peft.get_peft_model(model, config)
    own = [each for name, each in model.named_parameters() if "mpoe_" in name]
    assert held(model) == size + sum(each.numel() * each.element_size() for each in own)
    assert {each.dtype for each in own} == {torch.float32}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None for each in own)
    model.eval()
    with torch.no_grad():
        for each in own:
            each.add_(0.1 * torch.randn_like(each))
    changed = logits(model)
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    loaded = peft.PeftModel.from_pretrained(make(kind), tmp_path).eval()
    assert torch.equal(logits(loaded), changed)
    assert held(model) == held(loaded)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_nothing_is_merged_into_a_quantized_base(kind):
    model = peft.get_peft_model(make(kind), hf.MPOEAdapterConfig(num_experts=1, top_k=1))
    before = logits(model)
    with pytest.raises(tn.InputError, match="whose matrix is not held as floats"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_a_conversion_refuses_networks_in_four_bits_by_name():
    with pytest.raises(tn.InputError, match=r"model\.layers\.0: up is quantized \(FourBits\)"):
        hf.upcycle(make("four bits"), hf.MPOEConfig(num_experts=2))
