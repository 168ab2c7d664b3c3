"""A small dense model, and what ``tnmoe upcycle`` makes of it."""

import pytest
import torch
import transformers

from tests.cli.command import tnmoe


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mpoe(dense, tmp_path_factory):
    target = tmp_path_factory.mktemp("mpoe") / "model"
    done = tnmoe("upcycle", dense, target, "--experts", 4, "--top-k", 2, "--sites", 3,
                 "--shard-size", "50KB", "--seed", 3)  # fmt: skip
    return target, done
