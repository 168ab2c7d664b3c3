"""Intact files to corrupt: small folders of several families, operators, and tnmoe's own files."""

import dataclasses
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import transformers as tf

import tnmoe as tn
from tnmoe import hf
from tnmoe.contraction.rates import get_rates

_SMALL = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
_T5 = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
_GPT2 = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_CLIP = {
    "text_config": _SMALL | _TOKENS, "vision_config": _SMALL | {"image_size": 8, "patch_size": 4},
}  # fmt: skip
_DISTILBERT = {"vocab_size": 16, "dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}

_MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SMALL, head_dim=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2, **_TOKENS)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SMALL)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "distilbert": lambda: tf.DistilBertModel(tf.DistilBertConfig(**_DISTILBERT)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(**_CLIP)),
}


def make_intact(folder: Path) -> None:
    """Make all intact files. The part of a name before the first hyphen or dot is its kind."""
    torch.manual_seed(0)
    folder.mkdir()
    _make_folders(folder)
    _make_operators(folder)
    config = hf.MPOEConfig(num_experts=2, sites=3, max_bond={"up": 2}, shared_sites=[0], layers=[0])
    (folder / "config-of-tnmoe.json").write_text(json.dumps(config.to_dict()))
    (folder / "rates-cpu.json").write_text(json.dumps(dataclasses.asdict(get_rates("cpu"))))


def _make_folders(folder: Path) -> None:
    for name, make in _MODELS.items():
        model = make()
        # Some folders have several files and an index.
        size = {} if name in ("gpt2", "bert") else {"max_shard_size": "6KB"}
        model.save_pretrained(folder / f"dense-{name}", **size)
        model = hf.upcycle(model, hf.MPOEConfig(num_experts=2, sites=3))
        model.save_pretrained(folder / f"converted-{name}", **size)
    conversion = hf.prepare_export(folder / "converted-llama", to="dense")
    conversion.run(folder / "made-dense")
    with suppress(KeyboardInterrupt):
        conversion.run(folder / "begun", jobs=1, on_progress=_interrupt)
    (folder / "begun.partial" / ".tnmoe-lock-owner").write_text("a process that was killed")


def _interrupt(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def _make_operators(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shape = tn.MPOShape((2, 3, 2), (2, 2, 2), 11, 8)
    real = rng.normal(size=(11, 8))
    tn.save(folder / "operator-real", tn.decompose(real, shape))
    tn.save(folder / "operator-complex", tn.decompose(real * (1 + 2j), shape))
    tn.save(folder / "operator-half", tn.decompose(torch.tensor(real).bfloat16(), shape))
    tn.save(folder / "operator-shared", tn.SharedMPO.replicate(tn.decompose(real, shape), 3))
    tn.save(folder / "operator-base", tn.SharedMPO.from_base(tn.decompose(real, shape), 3, rng=0))


def copy_with_times(original: Path, place: Path) -> None:
    """Copy a file or a folder with its times, by which tnmoe knows the files that it wrote."""
    if original.is_dir():
        shutil.copytree(original, place)
    else:
        shutil.copy2(original, place)
