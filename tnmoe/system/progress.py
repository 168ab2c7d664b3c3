"""Progress bars with the time that is left, on terminals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def bar(*arguments: Any, **settings: Any) -> tqdm:
    """A tqdm on standard error, silent unless that is a terminal which can move its cursor."""
    if not _is_terminal():
        settings["disable"] = True  # only here, so that TQDM_DISABLE holds on terminals
    return tqdm(*arguments, **settings)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and with all there is; it draws a bar."""
    with bar(desc=what, unit=unit, unit_scale=unit == "B") as shown:
        first = True

        def show(done: int, total: int) -> None:
            nonlocal first
            if first:
                # What an earlier run did says nothing of this one's speed.
                shown.reset(total)
                shown.initial = shown.n = done
                first = False
            shown.update(done - shown.n)

        yield show


def end_line() -> None:
    """End the line in which the bar of a process stood that was stopped."""
    if _is_terminal():
        print(file=sys.stderr)


def _is_terminal() -> bool:
    there = sys.stderr is not None and sys.stderr.isatty()
    return there and os.environ.get("TERM") != "dumb"
