"""Errors for lack of memory: recognised, and explained by what the memory was for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Words by which torch, its libraries, JAX and the system report it in errors of a general type.
_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "can't start new thread",
)


def is_memory_error(error: BaseException) -> bool:
    """Check whether an error reports lack of memory, on the CPU or on another device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _PHRASES):
        return True
    return isinstance(error, MemoryError)


@contextmanager
def explain_memory_error(purpose: str) -> Iterator[None]:
    """Add a note to an error for lack of memory that leaves the block, and raise it again.

    Parameters
    ----------
    purpose : str
        What the block does, and how much memory that takes.
    """
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            error.add_note(purpose)
        raise


def memory_error_summary(error: BaseException) -> str:
    """Say in one line what lacked memory: the notes of the error, or else its own first line."""
    first_line = str(error).strip().splitlines()[:1]
    return "; ".join(getattr(error, "__notes__", None) or first_line or ["no more is known"])


def in_gigabytes(num_bytes: float) -> str:
    """Format a number of bytes, with two digits and the unit."""
    return f"{num_bytes / 1e9:.2g} GB"
