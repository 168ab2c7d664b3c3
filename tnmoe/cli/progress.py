"""A progress bar with the time that is left, on terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and with all there is; it draws a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=unit == "B", disable=None) as bar:
        first = True

        def show(done: int, total: int) -> None:
            nonlocal first
            if first:
                # What an earlier run did says nothing of this one's speed.
                bar.reset(total)
                bar.initial = bar.n = done
                first = False
            bar.update(done - bar.n)

        yield show
