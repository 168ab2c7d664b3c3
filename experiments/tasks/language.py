"""Prediction of the next token of a plain text, by a small GPT-2 or by real weights."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from experiments import weights
from experiments.task import SPLITS, Batch, Task, evaluating, random_generator
from experiments.texts import Text, encode, train_tokenizer

# Share at the end of a text that is held out, half for validation and half for the test.
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Language(Task):
    """A task on windows of a text; its loss is in nats per token.

    Attributes
    ----------
    text : Text
    window, windows : int
        Tokens of a window, and windows of a batch.
    held_out_tokens : int, optional
        Largest number of tokens to use of each held-out part.
    """

    text: Text
    window: int = 128
    windows: int = 8
    held_out_tokens: int | None = None

    @abstractmethod
    def tokenizer(self, folder: Path) -> Tokenizer:
        """Return the model's own tokenizer, or learn one from a text."""

    def prepare(self, folder: Path) -> dict[str, Any]:
        text = self.text.read()
        cut = round((1 - _HELD_OUT) * len(text))
        middle = (cut + len(text)) // 2
        parts = {"train": text[:cut], "validation": text[cut:middle], "test": text[middle:]}
        tokenizer = self.tokenizer(folder)
        sizes = {}
        for name, part in parts.items():
            tokens = encode(tokenizer, part)
            if name in SPLITS:
                tokens = tokens[: self.held_out_tokens]
            np.save(folder / f"{name}.npy", tokens)
            size = len(tokenizer.decode(tokens.tolist()).encode())
            sizes[name] = {"tokens": len(tokens), "bytes": size}
        (folder / "sizes.json").write_text(json.dumps(sizes))
        return {"text": self.text.describe(), "sizes": sizes}

    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        tokens = _tokens(folder / "train.npy")
        starts = random_generator(seed, step).integers(0, len(tokens) - self.window, self.windows)
        rows = np.stack([tokens[start : start + self.window] for start in starts])
        ids = torch.from_numpy(rows.astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Return nats per token in adjacent windows, without the first token of each window."""
        tokens = torch.from_numpy(_tokens(folder / f"{split}.npy").astype(np.int64))
        rows = tokens[: len(tokens) // self.window * self.window].view(-1, self.window)
        total = 0.0
        with evaluating(model):
            for ids in rows.to(model.device).split(2 * self.windows):
                logits = model(input_ids=ids).logits[:, :-1].float()
                total += float(F.cross_entropy(logits.mT, ids[:, 1:], reduction="sum"))
        loss = total / rows[:, 1:].numel()
        bytes_per_token = _sizes(folder)[split]["bytes"] / len(tokens)
        return {"loss": loss, "perplexity": exp(loss), "nats_per_byte": loss / bytes_per_token}


@dataclass(frozen=True)
class SmallGPT2(Language):
    """A GPT-2 as transformers builds it, with a vocabulary learned from a text.

    Attributes
    ----------
    vocabulary_from : Text
        Text from which the vocabulary is learned: that of the pretraining.
    pretrained : str, optional
        Folder beside this task's with the dense models of all seeds; by default models are random.
    """

    vocabulary_from: Text = field(default_factory=lambda: Text(Path()))
    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    pretrained: str | None = None

    def tokenizer(self, folder: Path) -> Tokenizer:
        return train_tokenizer(self.vocabulary_from.read(), self.vocabulary)

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        if self.pretrained is not None:
            return GPT2LMHeadModel.from_pretrained(folder.parent / self.pretrained / f"seed{seed}")
        config = GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.window, n_embd=self.width,
            n_layer=self.layers, n_head=self.heads, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class SmolLM2(Language):
    """The real SmolLM2-135M-Instruct, from the package that carries it."""

    def tokenizer(self, folder: Path) -> Tokenizer:
        return weights.smollm2_tokenizer().backend_tokenizer

    def prepare(self, folder: Path) -> dict[str, Any]:
        weights.smollm2_folder(folder)
        return super().prepare(folder)

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        return LlamaForCausalLM.from_pretrained(weights.smollm2_folder(folder))


@lru_cache
def _tokens(path: Path) -> np.ndarray:
    return np.load(path)


@lru_cache
def _sizes(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sizes.json").read_text())
