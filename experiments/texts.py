"""Plain texts: their licence, and their byte-pair tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tnmoe.errors import InputError

# Texts whose licence is known, by the beginning of their SHA-256.
_KNOWN = {
    "2b84ddbf684a5a9d": ("State of the Union addresses", "public domain"),
    "fe282a57094ed62e": ("Herman Melville, Moby-Dick", "public domain"),
}

# A text must hold a window and the held-out parts.
_MIN_CHARACTERS = 50_000


@dataclass(frozen=True)
class Text:
    """A file of plain text, or a part of one.

    Attributes
    ----------
    path : Path
    start, end : float
        The part to use, as shares of the file's characters.
    """

    path: Path
    start: float = 0.0
    end: float = 1.0

    def read(self) -> str:
        """Read the characters.

        Raises
        ------
        InputError
            If the file is not UTF-8 text, or too short to learn from.
        """
        try:
            whole = self.path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text: {error}") from error
        part = whole[round(self.start * len(whole)) : round(self.end * len(whole))]
        if len(part) < _MIN_CHARACTERS:
            raise InputError(
                f"{self.path} has {len(part):,} characters to use; {_MIN_CHARACTERS:,} are needed"
            )
        return part

    def describe(self) -> dict[str, Any]:
        """Return title, size and licence."""
        file = fingerprint(self.path)
        title, licence = _KNOWN.get(file["sha256"][:16], (self.path.name, "not known"))
        if self.path == Path(topics.__file__):
            title, licence = "help topics of Python", "PSF-2.0"
        return {"title": title, "licence": licence, **file, "part": [self.start, self.end]}


def fingerprint(path: Path) -> dict[str, Any]:
    """Compute size and SHA-256 of a file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def default_texts() -> tuple[Text, Text]:
    """Return two parts of the help topics that come with Python."""
    path = Path(topics.__file__)
    return Text(path, 0.0, 0.7), Text(path, 0.7, 1.0)


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Learn a byte-level byte-pair encoding from a text; token 0 is the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode a long text piece by piece."""
    encodings = tokenizer.encode_batch(_pieces(text), add_special_tokens=False)
    return np.concatenate([np.asarray(each.ids, dtype=np.int32) for each in encodings])


def _pieces(text: str) -> list[str]:
    """Split a text into lines, which keep their ends."""
    return text.splitlines(keepends=True)
