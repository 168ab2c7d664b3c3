"""Lack of memory: told from other errors, with what the memory was for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# How torch, the libraries that it calls, JAX and the system say it in errors of a general kind.
_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "can't start new thread",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is for lack of memory, of a CPU or of another device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(one in str(error).lower() for one in _PHRASES)
    return said or isinstance(error, MemoryError)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Note in an error for lack of memory what it was for; the error stays the same.

    Parameters
    ----------
    what : str
        What the block does, and how much that takes.
    """
    try:
        yield
    except Exception as error:
        if lacks_memory(error):
            error.add_note(what)
        raise


def told_in_a_line(error: BaseException) -> str:
    """What lacked memory: the notes of the error, or its own first line if there are none."""
    said = str(error).strip().splitlines()[:1]
    return "; ".join(getattr(error, "__notes__", None) or said or ["no more is known"])


def in_gigabytes(num_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / 1e9:.2g} GB"
