"""A disk that may lose its power: what is left of a folder, at every moment of some work on it.

A file's bytes are safe once the file is synced, and a name once its folder is. Of what is not safe,
anything may be lost, in any order; a file may keep its size and have zeros for bytes, as after
delayed allocation. A rename, which changes two names, happens or does not.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

# What a power cut leaves: bytes and time of every file, and None for a folder, by relative path.
State = frozenset[tuple[str, tuple[bytes, int] | None]]

# Functions of the module os that work on names or end what is being written.
_CALLS = ("open", "close", "mkdir", "rmdir", "rename", "replace", "unlink", "remove", "truncate",
          "utime", "link", "symlink")  # fmt: skip

_Names = dict[tuple[int, str], int]  # from a folder and a name there to a file or folder


@dataclass
class _Step:
    """Names that went and came in one operation, and the folders whose syncing is still due."""

    gone: _Names
    come: _Names
    due: set[int]

    def apply(self, names: _Names) -> None:
        for place, number in self.gone.items():
            if names.get(place) == number:
                del names[place]
        names |= self.come


class Disk:
    """Watches a folder while a block of :meth:`watched` runs.

    Parameters
    ----------
    root : Path
        The folder; all that it holds at first is safe.

    Attributes
    ----------
    left : dict from State to int
        All that power cuts could leave, and after how many operations.
    syncs : int
        How often a file or a folder was synced.
    """

    def __init__(self, root: Path) -> None:
        self.left: dict[State, int] = {}
        self.syncs = 0
        self._root, self._operations, self._busy = root, 0, False
        self._held: dict[int, int] = {}
        self._open, self._close = os.open, os.close
        self._number = self._hold(root, root.stat())
        self._start = self._now = self._names()
        self._steps: list[_Step] = []
        self._safe = {number: self._content(number) for number in self._files()}

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Count operations on files, and note what a power cut before or after each would leave."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._between(getattr(os, name)))
            patch.setattr(os, "fsync", self._sync)
            patch.setattr(builtins, "open", opened := self._between(open))
            patch.setattr(io, "open", opened)
            yield self
        self._observe()
        for descriptor in self._held.values():
            os.close(descriptor)

    def states(self) -> set[State]:
        """What a power cut at this moment could leave."""
        dirty = {n for n in self._files() if self._content(n) != self._safe.get(n)}
        contents = [self._contents(dirty, *each) for each in _choices(dirty)]
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
            gone = {place: n for place, n in before.items() if self._now.get(place) != n}
            come = {place: n for place, n in self._now.items() if before.get(place) != n}
            if gone or come:
                self._steps.append(_Step(gone, come, {folder for folder, _ in (*gone, *come)}))
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
                step.due.discard(number)
            self._forget_what_is_out_of_reach()
        self._observe()

    def _forget_what_is_out_of_reach(self) -> None:
        """Names in folders that are gone for good make no difference."""
        due = [step for step in self._steps if step.due]
        near = {self._number, *self._now.values()} | {n for s in due for n in s.gone.values()}
        for step in due:
            step.due &= near

    def _possible_names(self) -> Iterator[_Names]:
        due = [index for index, step in enumerate(self._steps) if step.due]
        lost = [set(), *({each} for each in due), *(set(due[end:]) for end in range(len(due))),
                *(set(due) - {each} for each in due)]  # fmt: skip
        for each in {frozenset(one) for one in lost}:
            names = dict(self._start)
            for index, step in enumerate(self._steps):
                if index not in each:
                    step.apply(names)
            yield names

    def _contents(
        self, dirty: Iterable[int], how: Callable, which: set[int]
    ) -> dict[int, tuple[bytes, int]]:
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
                    names[folder, entry.name] = number = self._hold(Path(entry.path), status)
                    if entry.is_dir(follow_symlinks=False):
                        walk(entry.path, number)

        walk(str(self._root), self._number)
        return names

    def _hold(self, path: Path, status: os.stat_result) -> int:
        """Keep a file open, so that its number is not given to another one."""
        if status.st_ino not in self._held:
            self._held[status.st_ino] = self._open(path, os.O_RDONLY)
        return status.st_ino

    def _files(self) -> list[int]:
        return [n for n, held in self._held.items() if stat.S_ISREG(os.fstat(held).st_mode)]

    def _content(self, number: int) -> tuple[bytes, int]:
        status = os.fstat(self._held[number])
        return os.pread(self._held[number], status.st_size, 0), status.st_mtime_ns


def _choices(dirty: set[int]) -> Iterator[tuple[Callable, set[int]]]:
    """How unsynced bytes may be lost, and of which files."""
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
    """A folder for each thing that power cuts may leave; only one at a time is there."""
    scratch.mkdir()
    for number, state in enumerate(disk.left):
        folder = scratch / str(number)
        _put_down(state, folder)
        yield folder
        shutil.rmtree(folder)


def _put_down(state: State, folder: Path) -> None:
    folder.mkdir()
    for path, content in sorted(state, key=lambda each: each[0]):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content[0])
            os.utime(folder / path, ns=(content[1], content[1]))
