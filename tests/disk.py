"""A simulated disk: what a power cut could leave of a folder, at every moment of some work on it.

The bytes of a file are safe once the file is synced. A name is safe once its folder is synced.
Everything else may be lost, in any order. A file may also keep its size and have zeros for bytes,
as after delayed allocation. A rename changes two names, both or neither.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

# What a power cut leaves: by relative path, bytes and time of a file, or None for a folder.
State = frozenset[tuple[str, tuple[bytes, int] | None]]

# Functions of the module os that change names or contents.
_CALLS = ("open", "close", "mkdir", "rmdir", "rename", "replace", "unlink", "remove", "truncate",
          "utime", "link", "symlink")  # fmt: skip

# From a folder's number and a name in it to the number of a file or folder.
_Names = dict[tuple[int, str], int]


@dataclass
class _Step:
    """A change of names by one operation.

    Attributes
    ----------
    removed, added : dict
    unsynced : set of int
        Folders that have to be synced before the change is safe.
    """

    removed: _Names
    added: _Names
    unsynced: set[int]

    def apply(self, names: _Names) -> None:
        """Change names as the operation did."""
        for place, number in self.removed.items():
            if names.get(place) == number:
                del names[place]
        names |= self.added


class Disk:
    """A watcher of a folder, which collects what power cuts could leave of it.

    Parameters
    ----------
    root : Path
        The folder. Its contents at first are safe.

    Attributes
    ----------
    left : dict from State to int
        Everything that power cuts could leave, with the number of operations before the cut.
    syncs : int
        Number of syncs of files and folders.
    """

    def __init__(self, root: Path) -> None:
        self.left: dict[State, int] = {}
        self.syncs = 0
        self._root, self._operations, self._busy = root, 0, False
        self._descriptors: dict[int, int] = {}
        self._open, self._close = os.open, os.close
        self._number = self._keep_open(root, root.stat())
        self._start = self._now = self._names()
        self._steps: list[_Step] = []
        self._safe = {number: self._content(number) for number in self._files()}

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Collect what power cuts before and after each operation of a block could leave."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._between(getattr(os, name)))
            patch.setattr(os, "fsync", self._sync)
            patch.setattr(builtins, "open", opened := self._between(open))
            patch.setattr(io, "open", opened)
            yield self
        self._observe()
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def states(self) -> set[State]:
        """Return what a power cut at this moment could leave."""
        dirty = {n for n in self._files() if self._content(n) != self._safe.get(n)}
        contents = [self._contents(*choice) for choice in _choices(dirty)]
        return {
            self._state(names, content)
            for names, content in product(self._possible_names(), contents)
        }

    def _between(self, call: Callable) -> Callable:
        def observed(*arguments: Any, **named: Any) -> Any:
            if self._busy:
                return call(*arguments, **named)
            self._observe()
            try:
                return call(*arguments, **named)
            finally:
                self._observe()

        return observed

    def _observe(self) -> None:
        self._busy = True
        try:
            before, self._now = self._now, self._names()
            removed = {place: n for place, n in before.items() if self._now.get(place) != n}
            added = {place: n for place, n in self._now.items() if before.get(place) != n}
            if removed or added:
                folders = {folder for folder, _ in (*removed, *added)}
                self._steps.append(_Step(removed, added, folders))
            self._operations += 1
            for state in self.states():
                self.left.setdefault(state, self._operations)
        finally:
            self._busy = False

    def _sync(self, file: Any) -> None:
        self._observe()
        self.syncs += 1
        number = os.fstat(file).st_ino
        if stat.S_ISREG(os.fstat(file).st_mode):
            self._safe[number] = self._content(number)
        else:
            for step in self._steps:
                step.unsynced.discard(number)
            self._forget_removed_folders()
        self._observe()

    def _forget_removed_folders(self) -> None:
        """Count folders as synced if no power cut can bring them back."""
        unsafe = [step for step in self._steps if step.unsynced]
        possible = {n for step in unsafe for n in step.removed.values()}
        possible |= {self._number, *self._now.values()}
        for step in unsafe:
            step.unsynced &= possible

    def _possible_names(self) -> Iterator[_Names]:
        """Yield the names after a power cut that loses a choice of unsafe steps.

        It loses none, one, all from one on, or all but one.
        """
        unsafe = [index for index, step in enumerate(self._steps) if step.unsynced]
        choices = [set(), *({index} for index in unsafe),
                   *(set(unsafe[end:]) for end in range(len(unsafe))),
                   *(set(unsafe) - {index} for index in unsafe)]  # fmt: skip
        for lost in set(map(frozenset, choices)):
            names = dict(self._start)
            for index, step in enumerate(self._steps):
                if index not in lost:
                    step.apply(names)
            yield names

    def _contents(self, how: Callable, which: set[int]) -> dict[int, tuple[bytes, int]]:
        changed = {n: how(self._safe.get(n, (b"", 0)), self._content(n)) for n in which}
        return {n: self._content(n) for n in self._files()} | changed

    def _state(self, names: _Names, contents: Mapping[int, tuple[bytes, int]]) -> State:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), number in names.items():
            inside.setdefault(folder, []).append((name, number))
        found: list[tuple[str, tuple[bytes, int] | None]] = []

        def walk(folder: int, path: str) -> None:
            for name, number in inside.get(folder, ()):
                found.append((f"{path}{name}", contents.get(number)))
                walk(number, f"{path}{name}/")

        walk(self._number, "")
        return frozenset(found)

    def _names(self) -> _Names:
        names: _Names = {}

        def walk(path: str, folder: int) -> None:
            with os.scandir(path) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    names[folder, entry.name] = number = self._keep_open(Path(entry.path), status)
                    if entry.is_dir(follow_symlinks=False):
                        walk(entry.path, number)

        walk(str(self._root), self._number)
        return names

    def _keep_open(self, path: Path, status: os.stat_result) -> int:
        """Return a file's number, and keep the file open so that no other file gets it."""
        if status.st_ino not in self._descriptors:
            self._descriptors[status.st_ino] = self._open(path, os.O_RDONLY)
        return status.st_ino

    def _files(self) -> list[int]:
        return [
            n for n, opened in self._descriptors.items() if stat.S_ISREG(os.fstat(opened).st_mode)
        ]

    def _content(self, number: int) -> tuple[bytes, int]:
        status = os.fstat(self._descriptors[number])
        return os.pread(self._descriptors[number], status.st_size, 0), status.st_mtime_ns


def _choices(dirty: set[int]) -> Iterator[tuple[Callable, set[int]]]:
    """Yield how unsynced bytes may be lost, and of which files."""
    yield _kept, set()
    for which in (dirty, *({each} for each in dirty)):
        for how in (_lost, _zeros, _torn):
            yield how, which


def _kept(safe: tuple[bytes, int], now: tuple[bytes, int]) -> tuple[bytes, int]:
    return now


def _lost(safe: tuple[bytes, int], now: tuple[bytes, int]) -> tuple[bytes, int]:
    return safe


def _zeros(safe: tuple[bytes, int], now: tuple[bytes, int]) -> tuple[bytes, int]:
    size = len(now[0])
    return safe[0][:size].ljust(size, b"\0"), now[1]


def _torn(safe: tuple[bytes, int], now: tuple[bytes, int]) -> tuple[bytes, int]:
    without = _zeros(safe, now)[0]
    changed = [place for place, pair in enumerate(zip(without, now[0], strict=True))
               if pair[0] != pair[1]] or [0]  # fmt: skip
    middle = (changed[0] + changed[-1] + 1) // 2
    return now[0][:middle] + without[middle:], now[1]


def all_left(disk: Disk, scratch: Path) -> Iterator[Path]:
    """Make a folder of each state that power cuts may leave, and remove it after its use."""
    scratch.mkdir()
    for number, state in enumerate(disk.left):
        folder = scratch / str(number)
        _write_state(state, folder)
        yield folder
        shutil.rmtree(folder)


def _write_state(state: State, folder: Path) -> None:
    folder.mkdir()
    for path, content in sorted(state, key=lambda each: each[0]):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content[0])
            os.utime(folder / path, ns=(content[1], content[1]))
