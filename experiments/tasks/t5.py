"""Encoder-decoders: a small T5 made here, or the real flan-t5-small."""

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

# Both vocabularies have these: token 0 pads and starts the decoder; the end and the sentinels.
PAD = 0
END = "</s>"
SENTINELS = 100
# Labels that the losses of transformers ignore.
IGNORED = -100
# File of a task's tokenizer in its folder.
TOKENIZER = "tokenizer.json"


class T5(ABC):
    """A source of a dense model and its vocabulary."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return a tokenizer with ``</s>`` and the sentinels ``<extra_id_0>`` …; token 0 pads."""

    @abstractmethod
    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        """Make the model for a task that was prepared in a folder."""


@dataclass(frozen=True)
class SmallT5(T5):
    """A T5 as transformers builds it, with a vocabulary learned from a text.

    Attributes
    ----------
    vocabulary_from : Text
        Text from which the vocabulary is learned: that of the pretraining.
    vocabulary : int
        Number of tokens, the end and the sentinels included.
    width, hidden, heads : int
        Sizes of the model and its feed-forward networks, and number of attention heads.
    layers : int
        Layers of the encoder, and also of the decoder.
    gated : bool
        Gated GELU as in T5 1.1 and flan-T5, instead of plain ReLU.
    pretrained : str, optional
        Folder beside the task's with the dense models of all seeds; by default models are random.
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
        # T5 draws embeddings with deviation 1 and scales the decoder's output. This suits
        # Adafactor, whose steps are proportional to the parameters; AdamW would hardly move them.
        # With smaller embeddings logits have the same size without the scaling.
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
        # The stored tokenizer truncates to short inputs.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        return weights.flan_t5()


@dataclass(frozen=True, kw_only=True)
class TextToText(Task):
    """A task for every T5.

    Attributes
    ----------
    model : T5
    examples : int
        Examples of a batch.
    held_out_examples : int, optional
        Largest number of examples to use of each held-out part.
    """

    model: T5
    examples: int = 16
    held_out_examples: int | None = None

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        return self.model.dense(folder, seed)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities of whole targets, (B,)."""
    each = F.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=IGNORED)
    return -each.double().sum(1)


@lru_cache
def array(path: Path) -> np.ndarray:
    return np.load(path)


@lru_cache
def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / TOKENIZER))
