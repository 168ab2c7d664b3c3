"""A setting of the whole process that blocks in several threads change together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class ProcessSetting:
    """A setting that belongs to the process and not to a thread.

    The first block that needs another value changes the setting, and the last block to end restores
    it.

    Parameters
    ----------
    change : function
        Changes the setting and returns a function that restores it, or returns None if the setting
        has the needed value already.
    """

    def __init__(self, change: Callable[[], Callable[[], None] | None]) -> None:
        self._lock, self._blocks = Lock(), 0
        self._change = change
        self._restore: Callable[[], None] | None = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Give the setting the needed value in a block."""
        if not self._enter():
            yield
            return
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> bool:
        """Count a block in; return False, and count nothing, if nothing needs to change."""
        with self._lock:
            if not self._blocks:
                self._restore = self._change()
                if self._restore is None:
                    return False
            self._blocks += 1
            return True

    def _leave(self) -> None:
        """Count a block out; after the last block, restore what the first one found."""
        with self._lock:
            self._blocks -= 1
            if not self._blocks and self._restore is not None:
                self._restore()
