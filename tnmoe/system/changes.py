"""Noticing that a file changes while other work relies on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """Values of a file that change when the file is written to or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    # Programs can set the time of modification, but not this one.
    changed_ns: int


def file_states(paths: Iterable[Path]) -> dict[Path, FileState | None]:
    """Return the state of each file; None for a file that does not exist."""
    return {path: _state(path) for path in paths}


def first_changed(states: Mapping[Path, FileState | None]) -> Path | None:
    """Return a file that changed since :func:`file_states`, or None if none did."""
    return next((path for path, before in states.items() if _state(path) != before), None)


def _state(path: Path) -> FileState | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileState(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
