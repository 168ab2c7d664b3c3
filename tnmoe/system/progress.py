"""Progress bars with the time left, drawn only on terminals that somebody watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# Values of TERM for terminals that cannot move their cursor. A log that is written through a
# pseudo-terminal often has no TERM at all.
_NO_CURSOR = ("", "dumb", "unknown")


def progress_bar(*arguments: Any, **settings: Any) -> tqdm:
    """Return a tqdm on standard error, which draws nothing in a log.

    Parameters
    ----------
    *arguments, **settings
        As for ``tqdm``.
    """
    if not _is_watched():
        settings["disable"] = True  # left unset elsewhere, so that TQDM_DISABLE holds on terminals
    return tqdm(*arguments, **settings)


@contextmanager
def progress_callback(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar while the block runs, and yield the function that moves it.

    Parameters
    ----------
    description : str
    unit : str
        What is counted; ``B`` for bytes.

    Yields
    ------
    callable
        Takes the amount that is done and the total.
    """
    with progress_bar(desc=description, unit=unit, unit_scale=unit == "B") as bar:
        is_first = True

        def show(done: int, total: int) -> None:
            nonlocal is_first
            if is_first:
                # Work of an earlier run must not count towards the speed of this one.
                bar.reset(total)
                bar.initial = bar.n = done
                is_first = False
            bar.update(done - bar.n)

        yield show


def end_line() -> None:
    """End the line that holds the bar of a process which was stopped."""
    if _is_watched():
        print(file=sys.stderr)


def _is_watched() -> bool:
    """Check that standard error is a terminal of somebody who watches it.

    A log may be written through a pseudo-terminal, too. It has no type (TERM) or no width then, or
    the variable CI says that no person started the command.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("CI"):
        return False
    if os.name != "nt" and os.environ.get("TERM", "") in _NO_CURSOR:
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0
