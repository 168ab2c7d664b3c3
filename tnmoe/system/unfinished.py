"""A folder that is made beside its target, by one process or in parts, and moves there whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.durable import sync, write_atomically
from tnmoe.system.folders import (
    check_no_foreign_files,
    check_target,
    remove_own_files,
    write_manifest,
)
from tnmoe.system.locks import locked
from tnmoe.system.parts import Part

# Names of the files that an unfinished folder has, and each part of it.
_LOCK, _JOURNAL = ".tnmoe-lock", ".tnmoe-journal"

# Largest journal in bytes. A journal has one line per step; a larger file is not a journal.
_MAX_JOURNAL_BYTES = 100_000_000

# Last line of the journal: the new folder is whole. It may have moved to the target already.
_WHOLE = "whole"

# Seconds for which a part waits while other parts begin.
_WAIT = 120.0


class UnfinishedFolder:
    """A new folder on its way to its target, kept in ``TARGET.partial`` until it is whole.

    ``TARGET.partial`` holds four things:

    - a lock;
    - a journal: its first line states the purpose of the folder, the lines after it list the
      steps that are done;
    - the new folder, until it moves to the target;
    - the old folder, while the new one replaces it.

    Several processes may fill the new folder at the same time, each a part of it. A part has a lock
    of its own, and a journal that lists its steps. It holds the folder's lock only while it begins.
    Once no part is at work, a process that holds the folder's lock takes the steps that are left
    and moves the folder.

    A killed process loses the lock and nothing else: the next process reads from the rest where
    to resume. The same holds after a power cut. The files that a line of the journal declares done
    are on the disk before the line is, and the line is before any step that relies on it.

    Parameters
    ----------
    target : path
        Folder to make. If it is a link, the folder that it leads to is made and the link stays.

    Attributes
    ----------
    target : Path
        With links resolved.
    partial : Path
        ``TARGET.partial``.
    new : Path
        The folder to fill, which :meth:`begin` makes.
    """

    def __init__(self, target: str | os.PathLike) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise InputError(f"{self.target} cannot be replaced: choose another folder")
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self.new = self.partial / "new"
        self._old = self.partial / "old"
        self._journal = self._file_of(None, _JOURNAL)

    @contextmanager
    def lock(self, part: Part | None = None) -> Iterator[str | None]:
        """Keep other processes out while the block runs, and complete a move that broke off.

        Parameters
        ----------
        part : Part, optional
            The part that begins in the block. The lock waits while other parts begin, and admits
            those of the same total that are at work.

        Yields
        ------
        str or None
            The purpose of a folder that an earlier process moved to the target, if that process
            died right after the move.

        Raises
        ------
        InputError
            If another process holds the lock, ``TARGET.partial`` cannot be written to, or
            something else has that name.
        """
        missing = [parent for parent in self.partial.parents if not parent.exists()]
        subfolders = (self.new, self._old)
        self._check_partial(*subfolders)
        try:
            wait = 0 if part is None else _WAIT
            with locked(self._file_of(None, _LOCK), str(self.target), wait):
                # The subfolders are made after the journal and removed before it.
                self._check_partial(*(subfolders if self._journal.is_file() else ()))
                for folder in missing:
                    sync(folder.parent)
                self._check_no_part_at_work(part)
                yield self._complete_move()
        finally:
            # Remove the folders that were made for the lock; rmdir spares folders with contents.
            with suppress(OSError):
                for folder in (self.partial, *missing):
                    folder.rmdir()

    def _check_partial(self, *subfolders: Path) -> None:
        """Raise an InputError if ``TARGET.partial`` holds anything else than an unfinished folder.

        Parameters
        ----------
        subfolders : Path
            Subfolders that it may hold.
        """
        try:
            names = set(os.listdir(self.partial)) - {folder.name for folder in subfolders}
        except FileNotFoundError:
            names = set()
        except NotADirectoryError:
            # A file has the name of the folder itself, or of one of its parents.
            names = {self.partial.name} if self.partial.exists() else set()
        if self.partial.is_symlink() or not all(_is_own_name(name) for name in names):
            raise InputError(f"{self.partial} is in the way")

    @contextmanager
    def lock_part(self, part: Part) -> Iterator[None]:
        """Keep other processes from working on a part while the block runs.

        The block may outlast that of :meth:`lock`, in which it has to begin.
        """
        with locked(self._file_of(part, _LOCK), f"part {part} of {self.target}"):
            yield

    def _check_no_part_at_work(self, beginning: Part | None = None) -> None:
        """Raise an InputError if another process works on a part that must not be at work now.

        Parameters
        ----------
        beginning : Part, optional
            The other parts of its total may be at work.
        """
        for part in self._parts_with(_LOCK):
            is_sibling = beginning and part != beginning and part.total == beginning.total
            if not is_sibling:
                # This also removes the lock of a killed process.
                with self.lock_part(part):
                    pass

    def _file_of(self, part: Part | None, kind: str) -> Path:
        """Return the lock or the journal of a part; of the folder itself without one."""
        return self.partial / (f"{kind}-{part.number}-of-{part.total}" if part else kind)

    def _parts_with(self, kind: str) -> list[Part]:
        """List the parts that have a lock or a journal."""
        # A power cut may leave the name of a lock's owner without the lock.
        pattern = rf"{re.escape(kind)}-(\d+)-of-(\d+)(-owner)?"
        found = [re.fullmatch(pattern, name) for name in os.listdir(self.partial)]
        return sorted({Part(int(each[1]), int(each[2])) for each in found if each})

    def journal(self) -> list[str]:
        """Return the lines of the journal: the purpose, then the steps that are done.

        The steps of parts are in journals of their own.
        """
        return _read_lines(self._journal)

    def steps(self, purpose: str) -> set[str]:
        """Return the steps that are done, in parts or not; none if the purpose is another."""
        lines = self.journal()
        if lines[:1] != [purpose] or not self.new.is_dir():
            return set()
        journals = [self._file_of(part, _JOURNAL) for part in self._parts_with(_JOURNAL)]
        return set(chain(lines[1:], *map(_read_lines, journals)))

    @property
    def is_whole(self) -> bool:
        """Whether the new folder is complete, and still in ``TARGET.partial``."""
        return self.journal()[-1:] == [_WHOLE] and self.new.is_dir()

    def begin(self, purpose: str) -> None:
        """Make an empty new folder, and a journal with this purpose as its first line."""
        self.discard()
        try:
            sync(self.partial.parent)
            write_atomically(self._journal, _as_text([purpose]))
            self.new.mkdir()
            sync(self.partial)
        except OSError as error:
            raise InputError(f"cannot write to {self.partial}: {error.strerror}") from error

    def resume(self, part: Part | None = None) -> None:
        """Prepare a journal for more lines: drop a line that broke off while it was written."""
        journal = self._file_of(part, _JOURNAL)
        write_atomically(journal, _as_text(_read_lines(journal)))

    def mark_done(self, step: str, part: Part | None = None) -> None:
        """Add a step to a journal; what the step wrote has to be on the disk already.

        Parameters
        ----------
        step : str
        part : Part, optional
            The part to whose journal the step goes; by default to that of the folder.
        """
        journal = self._file_of(part, _JOURNAL)
        with open(journal, "a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        sync(journal)

    def discard(self) -> None:
        """Remove the new folder and the journals; raise if a part is at work."""
        self._check_no_part_at_work()
        if parts := self._parts_with(_JOURNAL):
            # First, so that they never outlive the folder that they describe, nor its journal.
            for part in parts:
                self._file_of(part, _JOURNAL).unlink()
            sync(self.partial)
        if self.new.exists() or self._old.exists():
            if self._journal.exists():
                # With an empty journal, a process that is stopped here has nothing to resume.
                os.truncate(self._journal, 0)
                sync(self._journal)
            if self.new.exists():
                shutil.rmtree(self.new)
                sync(self.partial)
        if not self._old.exists():
            # The pattern also matches the temporary file of a journal that was being written.
            for path in self.partial.glob(f"*{self._journal.name}*"):
                path.unlink()
        sync(self.partial)

    def move_to_target(self, overwrite: bool) -> None:
        """Move the new folder to the target; then remove the folder that it replaces.

        Files that appear at the target meanwhile are never replaced, nor files that tnmoe did not
        write.

        Parameters
        ----------
        overwrite : bool
            Replace files that tnmoe wrote.

        Raises
        ------
        InputError
            If the target holds files that must not be replaced.
        OSError
            If the move fails. After either error the target is as it was, and the new folder is
            still in ``TARGET.partial``.
        """
        if not self.is_whole:
            write_manifest(self.new)
            self.mark_done(_WHOLE)
        check_target(self.target, overwrite)
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                self.target.rename(self._old)
                # A file may have come since the check. Once the folder is away, none can.
                check_no_foreign_files(self.target, self._old)
            self._move_new()
        except BaseException as failure:
            self._restore_old(failure)
            raise
        self._complete_move()

    def _move_new(self) -> None:
        try:
            _rename(self.new, self.target)
        except OSError:
            check_target(self.target, overwrite=False)
            raise

    def _restore_old(self, failure: BaseException) -> None:
        if not (self._old.exists() and self.new.exists()):
            return
        try:
            _rename(self._old, self.target)
        except OSError:
            raise InputError(
                f"{self.target} could not be replaced ({failure}), nor put back: "
                f"it is now {self._old}"
            ) from failure

    def _complete_move(self) -> str | None:
        """Remove the old folder or put it back, whichever is due.

        Returns
        -------
        str or None
            The purpose of the new folder, if it is at the target.
        """
        journal = self.journal()
        moved = journal[-1:] == [_WHOLE] and not self.new.exists()
        if moved:
            self._sync_names()  # before the only other copy is removed
        if self._old.exists():
            if moved:
                remove_own_files(self._old)
            elif self.target.exists():
                raise InputError(f"{self._old} is what {self.target} was before: move it away")
            else:
                _rename(self._old, self.target)
            self._sync_names()
        if not moved:
            return None
        self.discard()
        return journal[0] if self.target.is_dir() else None

    def _sync_names(self) -> None:
        """Wait until renamed folders have their new names on the disk."""
        sync(self.partial)
        sync(self.target.parent)


def _is_own_name(name: str) -> bool:
    return name.lstrip(".").startswith("tnmoe-")


def _rename(folder: Path, target: Path) -> None:
    """Rename a folder; an OSError says that the target exists, unless it is an empty folder."""
    try:
        folder.rename(target)
    except FileExistsError:
        target.rmdir()  # Windows does not replace an empty folder
        folder.rename(target)


def _read_lines(journal: Path) -> list[str]:
    """Return the complete lines of a journal, without a last one that broke off."""
    if not journal.is_file() or journal.stat().st_size > _MAX_JOURNAL_BYTES:
        return []
    return journal.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _as_text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
