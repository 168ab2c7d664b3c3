"""Checkpoints whose auxiliary cores have the names that they had once."""

import re

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.hf.families import IDS
from tnmoe import hf


@torch.no_grad()
def test_a_checkpoint_with_former_names_loads_and_is_saved_with_those_of_today(tmp_path):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    settings = hf.MPOEConfig(num_experts=4, sites=3, expert_noise=0.1)
    model = hf.upcycle(tf.LlamaForCausalLM(config).eval(), settings)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    former = {re.sub(r"aux_(\d+)$", r"aux.\1", name): each for name, each in tensors.items()}
    assert set(former) != set(tensors)
    save_file(former, path, {"format": "pt"})
    for load in (tf.AutoModelForCausalLM.from_pretrained, hf.from_pretrained):
        loaded = load(tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(tensors)
