"""Span corruption, the task on which T5 is pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from experiments.task import SPLITS, Batch, evaluating, random_generator
from experiments.tasks.t5 import (
    END,
    SENTINELS,
    TOKENIZER,
    TextToText,
    array,
    log_probabilities,
    tokenizer_of,
)
from experiments.texts import Text, encode

# Corrupted share of the tokens, and mean length of a span, as in T5.
_CORRUPTED, _SPAN = 0.15, 3
# Share at the end of a text that is held out, half for validation and half for the test.
_HELD_OUT = 0.1
# Seeds of the held-out data, which are the same for all runs.
_FIXED = {"validation": (7, 1), "test": (7, 2)}


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(TextToText):
    """A task in which the model writes the hidden spans of a text.

    All windows have the same number of hidden tokens and of spans, so nothing is padded.

    Attributes
    ----------
    text : Text
    window : int
        Tokens of an example before its corruption.

    References
    ----------
    Raffel et al., arXiv:1910.10683, section 3.1.4: spans; 15 % of the tokens, 3 a span.
    """

    text: Text
    window: int = 128

    def prepare(self, folder: Path) -> dict[str, Any]:
        text = self.text.read()
        cut = round((1 - _HELD_OUT) * len(text))
        middle = (cut + len(text)) // 2
        parts = {"train": text[:cut], "validation": text[cut:middle], "test": text[middle:]}
        tokenizer = self.model.tokenizer()
        tokenizer.save(str(folder / TOKENIZER))
        tokens = {name: encode(tokenizer, part) for name, part in parts.items()}
        np.save(folder / "train.npy", tokens["train"])
        sizes = {"train": {"tokens": len(tokens["train"])}}
        for name in SPLITS:
            starts = np.arange(0, len(tokens[name]) - self.window + 1, self.window)
            starts = starts[: self.held_out_examples]
            inputs, targets = self._corrupted(folder, tokens[name], starts, _FIXED[name])
            np.save(folder / f"{name}-inputs.npy", inputs)
            np.save(folder / f"{name}-targets.npy", targets)
            sizes[name] = {"examples": len(inputs), "target_tokens": targets.size}
        return {"text": self.text.describe(), "sizes": sizes}

    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        tokens = array(folder / "train.npy")
        starts = random_generator(seed, step).integers(
            0, len(tokens) - self.window + 1, self.examples
        )
        inputs, targets = self._corrupted(folder, tokens, starts, (seed, step, 1))
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}

    def _corrupted(
        self, folder: Path, tokens: np.ndarray, starts: np.ndarray, key: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of windows, (windows, tokens) each."""
        end, sentinels = _marks(folder)
        random = random_generator(*key)
        windows = [tokens[start : start + self.window] for start in starts]
        pairs = [corrupt(window, random, sentinels, end) for window in windows]
        inputs, targets = zip(*pairs, strict=True)
        return np.stack(inputs), np.stack(targets)

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Return nats per token of the targets, sentinels and ends included."""
        inputs = torch.from_numpy(array(folder / f"{split}-inputs.npy"))
        targets = torch.from_numpy(array(folder / f"{split}-targets.npy"))
        total = 0.0
        with evaluating(model):
            for rows in torch.arange(len(inputs)).split(2 * self.examples):
                ids, labels = inputs[rows].to(model.device), targets[rows].to(model.device)
                logits = model(input_ids=ids, labels=labels).logits
                total -= float(log_probabilities(logits, labels).sum())
        return {"loss": total / targets.numel()}


def corrupt(
    tokens: np.ndarray, random: np.random.Generator, sentinels: Sequence[int], end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide spans of tokens behind sentinels.

    As in T5's own code, kept and hidden spans alternate, beginning with a kept one. Lengths are
    drawn uniformly among those with the right sum. An end replaces the paper's last sentinel.

    Parameters
    ----------
    tokens : ndarray of int, shape (T,)
    random : numpy Generator
    sentinels : sequence of int
        Replacements of the spans, in this order; surplus sentinels stay unused.
    end : int
        Token that ends both results.

    Returns
    -------
    inputs, targets : ndarray of int64
        The kept tokens with a sentinel for each span; each sentinel followed by its span.
    """
    hidden = round(_CORRUPTED * len(tokens))
    spans = max(1, round(hidden / _SPAN))
    lengths = [_lengths(len(tokens) - hidden, spans, random), _lengths(hidden, spans, random)]
    pieces = np.split(tokens, np.cumsum(np.stack(lengths, 1))[:-1])
    inputs: list[int] = []
    targets: list[int] = []
    for sentinel, kept, lost in zip(sentinels, pieces[::2], pieces[1::2], strict=False):
        inputs += [*kept, sentinel]
        targets += [sentinel, *lost]
    return np.array([*inputs, end], np.int64), np.array([*targets, end], np.int64)


def _lengths(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw positive lengths that sum to a total, uniformly among all such sequences."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


@lru_cache
def _marks(folder: Path) -> tuple[int, list[int]]:
    """Return the tokens of the end and of the sentinels, in their order."""
    vocabulary = tokenizer_of(folder).get_vocab()
    return vocabulary[END], [vocabulary[f"<extra_id_{index}>"] for index in range(SENTINELS)]
