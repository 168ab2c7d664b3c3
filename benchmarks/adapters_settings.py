"""Settings of the benchmark of adapters: a base model, two domains, and a budget.

A domain is a task of ``experiments``, with its own texts. A batch takes half of its rows from each
domain, and held-out losses are those of each domain and their mean.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compression_models import python_source
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.task import Batch, Task
from experiments.tasks.language import Language
from experiments.tasks.reviews import MiniLM
from experiments.texts import Text, default_texts, train_tokenizer
from experiments.weights import smollm2_folder, smollm2_tokenizer
from tnmoe.demo.data import packaged_reviews, read_sentences

# Characters of Python's source; about as many as Moby-Dick has.
_PYTHON = 1_200_000
# Rates that suit LoRA of many ranks and experts of few: a matrix of few ranks moves less in a step.
_RATES = (1e-3, 3e-3)
# Reviews of IMDb; as many as Rotten Tomatoes has.
_IMDB = 8530


@dataclass(frozen=True)
class Setting:
    """A base model and the domains that adapters learn.

    Attributes
    ----------
    folder : Path
        Where the domains' tokens are, a folder each.
    domains : mapping from str to Task
        The first one's task makes the base model.
    ffn, linear : str
        Regular expressions for the linear layers of feed-forward networks, and for those of
        attention and feed-forward networks.
    rank : int
        Rank of LoRA on ``ffn`` whose trained parameters are the budget.
    steps : int
    rates : sequence of float
        Peaks of the learning rate, of which every method gets its best.
    head : str, optional
        A module that trains with every adapter. The budget does not count it.
    """

    folder: Path
    domains: Mapping[str, Task]
    ffn: str
    linear: str
    rank: int
    steps: int
    rates: Sequence[float]
    head: str | None = None

    def prepare(self) -> dict[str, Any]:
        """Write what the domains need, once for a folder; return their descriptions."""
        found = {}
        for name, task in self.domains.items():
            about = self.folder / name / "about.json"
            if not about.exists():
                about.parent.mkdir(parents=True, exist_ok=True)
                description = task.prepare(about.parent)
                about.write_text(json.dumps(description))
            found[name] = json.loads(about.read_text())
        return found

    def base(self, seed: int) -> Any:
        """Make the base model."""
        name, task = next(iter(self.domains.items()))
        return task.dense(self.folder / name, seed)

    def batch(self, step: int, seed: int) -> Batch:
        """Return the batch of a step, the domains one after the other."""
        return joined(
            [task.batch(self.folder / name, step, seed) for name, task in self.domains.items()]
        )

    def evaluate(self, model: Any, domain: str, split: str) -> dict[str, float]:
        """Return the held-out results of a domain."""
        return self.domains[domain].evaluate(model, self.folder / domain, split)


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches, padded on the right with zeros to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, longest - tensor.shape[1])) if tensor.ndim > 1 else tensor

    return {name: torch.cat([padded(batch[name]) for batch in batches]) for name in batches[0]}


@dataclass(frozen=True)
class SmolLM2(Language):
    """SmolLM2-135M-Instruct, whose weights all domains share."""

    def tokenizer(self, folder: Path) -> Any:
        return smollm2_tokenizer().backend_tokenizer

    def dense(self, folder: Path, seed: int) -> Any:
        return LlamaForCausalLM.from_pretrained(smollm2_folder(folder.parent))


@dataclass(frozen=True, kw_only=True)
class TinyLlama(Language):
    """A random Llama of two layers, with a vocabulary learned from one text."""

    vocabulary_from: Text

    def tokenizer(self, folder: Path) -> Any:
        return train_tokenizer(self.vocabulary_from.read(), 300)

    def dense(self, folder: Path, seed: int) -> Any:
        config = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=self.window,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def texts(folder: Path, first: Path | None) -> dict[str, Text]:
    """Return two domains: a text, by default Python's help topics, and Python's source."""
    source = folder / "python.txt"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source.write_text(python_source()[:_PYTHON], encoding="utf-8")
    text = Text(first) if first else Text(default_texts()[0].path)
    return {"text": text, "python": Text(source)}


_LLAMA = {"ffn": r".*\.mlp\.\w+_proj", "linear": r".*\.(mlp|self_attn)\.\w+_proj"}


# Budgets: LoRA of rank 16, and one or two ranks more, which pay for the routers. Eight experts of
# bond 2 have 16 ranks. At rank 8, eight experts of bond 1 and their routers would not fit.
def smollm2(folder: Path, text: Path | None) -> Setting:
    """Return the setting of SmolLM2-135M-Instruct on a text and Python's source."""
    domains = {
        name: SmolLM2(each, windows=1, held_out_tokens=2048)
        for name, each in texts(folder, text).items()
    }
    return Setting(folder, domains, **_LLAMA, rank=17, steps=40, rates=_RATES)


def tiny(folder: Path, text: Path | None) -> Setting:
    """Return a setting that takes seconds."""
    first, second = texts(folder, text).values()
    domains = {
        name: TinyLlama(each, 16, 2, 256, vocabulary_from=second)
        for name, each in (("text", first), ("python", second))
    }
    return Setting(folder, domains, **_LLAMA, rank=20, steps=3, rates=(1e-3, 1e-2))


def minilm(folder: Path, text: Path | None) -> Setting:
    """Return the setting of MiniLM on reviews from two sources: sentences, and beginnings."""
    imdb = folder / "imdb.csv"
    if not imdb.exists():
        write_imdb(imdb)
    common: Any = {"batch_size": 8, "length": 32, "held_out": 200}
    domains = {"sentences": MiniLM(**common), "imdb": MiniLM(sentences=imdb, **common)}
    return Setting(
        folder, domains, ffn=r".*\.layer\.\d+\.(intermediate|output)\.dense",
        linear=r".*\.layer\.\d+\..*(query|key|value|dense)", rank=18, steps=120,
        rates=(1e-3, 2e-3, 4e-3), head="classifier",
    )  # fmt: skip


def write_imdb(file: Path) -> None:
    """Write some reviews of IMDb, drawn at random, as a file of texts and labels."""
    reviews = read_sentences(packaged_reviews(), "imdb")
    rows = list(zip(reviews.texts, reviews.labels, strict=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        writer.writerows(random.Random(0).sample(rows, _IMDB))
    partial.replace(file)


SETTINGS: dict[str, Callable[[Path, Path | None], Setting]] = {
    "smollm2": smollm2, "minilm": minilm, "tiny": tiny
}  # fmt: skip
