"""Models that read and write: a small T5 made here, or the real flan-t5-small."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from experiments import weights
from experiments.task import Task
from experiments.texts import Text, train_tokenizer

# What both vocabularies have in common: token 0 pads and starts the decoder, and these names.
PAD = 0
END = "</s>"
SENTINELS = 100
# Labels that count in no loss, in transformers.
IGNORED = -100
# File of a task's tokenizer, in its folder.
TOKENIZER = "tokenizer.json"


class T5(ABC):
    """Where a task's dense model and its vocabulary come from."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """It knows ``</s>`` and the sentinels ``<extra_id_0>`` and so on; token 0 pads."""

    @abstractmethod
    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        """The model, for a task that was prepared in a folder."""


@dataclass(frozen=True)
class SmallT5(T5):
    """A T5 as transformers builds it, with a vocabulary learned from a text.

    Attributes
    ----------
    vocabulary_from : Text
        What the vocabulary is learned from: the text of the pretraining.
    vocabulary : int
        How many tokens, the end and the sentinels included.
    width, hidden, layers, heads : int
        Of the model and of its feed-forward networks; so many layers has each of its halves.
    gated : bool
        Gated GELU as in T5 1.1 and flan-T5, instead of plain ReLU.
    pretrained : str, optional
        Where the dense models of all seeds lie, beside the task's folder; random ones without.
    """

    vocabulary_from: Text
    vocabulary: int = 2048
    width: int = 128
    hidden: int = 512
    layers: int = 2
    heads: int = 4
    gated: bool = False
    pretrained: str | None = None

    def tokenizer(self) -> Tokenizer:
        text = self.vocabulary_from.read()
        tokenizer = train_tokenizer(text, self.vocabulary - SENTINELS - 1)
        # As in T5, the first sentinel is the last token.
        sentinels = [f"<extra_id_{index}>" for index in reversed(range(SENTINELS))]
        tokenizer.add_special_tokens([END, *sentinels])
        return tokenizer

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        if self.pretrained is not None:
            pretrained = folder.parent / self.pretrained / f"seed{seed}"
            return T5ForConditionalGeneration.from_pretrained(pretrained)
        tokenizer = tokenizer_of(folder)
        settings: dict[str, Any] = {
            "vocab_size": tokenizer.get_vocab_size(), "d_model": self.width, "d_ff": self.hidden,
            "d_kv": self.width // self.heads, "num_layers": self.layers, "num_heads": self.heads,
            "feed_forward_proj": "gated-gelu" if self.gated else "relu", "dropout_rate": 0.0,
            "pad_token_id": PAD, "decoder_start_token_id": PAD,
            "eos_token_id": tokenizer.token_to_id(END),
        }  # fmt: skip
        config = T5Config(**settings)
        # T5 draws embeddings as large as 1 and scales what the decoder gives. That suits Adafactor,
        # whose steps grow with what they change; AdamW's hardly move it. Drawn so small, logits
        # are as large without the scaling.
        config.scale_decoder_outputs = False
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            model.shared.weight.mul_(self.width**-0.5)
        return model


@dataclass(frozen=True)
class FlanT5(T5):
    """The real flan-t5-small, from the package that carries it."""

    def tokenizer(self) -> Tokenizer:
        tokenizer = weights.flan_t5_tokenizer()
        # It comes set up for short inputs.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        return weights.flan_t5()


@dataclass(frozen=True, kw_only=True)
class TextToText(Task):
    """A source of data that goes with every T5.

    Attributes
    ----------
    model : T5
    examples : int
        Of a batch.
    held_out_examples : int, optional
        Of each held-out part only so many are looked at.
    """

    model: T5
    examples: int = 16
    held_out_examples: int | None = None

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        return self.model.dense(folder, seed)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of whole targets, (B,)."""
    each = F.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=IGNORED)
    return -each.double().sum(1)


@lru_cache
def array(path: Path) -> np.ndarray:
    return np.load(path)


@lru_cache
def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / TOKENIZER))
