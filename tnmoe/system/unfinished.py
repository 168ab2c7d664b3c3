"""A folder in the making: beside its place, by one process at a time, whole or not in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.folders import (
    check_recorded,
    check_target,
    remove_recorded,
    sync,
    write_record,
    write_whole,
)
from tnmoe.system.locks import locked

# Bytes of a journal, which has a line per piece: a larger one is none.
_LARGEST = 100_000_000

# The journal's last line: all is in the new folder, which may have moved.
_WHOLE = "whole"


class Work:
    """What is being made of a folder, in ``TARGET.partial``.

    That folder holds a lock; a journal, whose first line says what is being made and whose others
    what is done; the new folder, while it is not in place; and the old one, while it is being
    replaced. A process that is killed loses the lock and nothing else: from the rest, the next
    one knows where to go on. After a power cut, too: what a line of the journal tells of is on the
    disk before the line is, and the line before whatever relies on it.

    Parameters
    ----------
    target : path
        Folder to make. A link is followed, and stays.

    Attributes
    ----------
    target : Path
        Without links.
    folder : Path
        Where the work lies.
    new : Path
        The folder to fill, which :meth:`begin` makes.
    """

    def __init__(self, target: str | os.PathLike) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise InputError(f"{self.target} cannot be replaced: choose another folder")
        self.folder = self.target.with_name(f"{self.target.name}.partial")
        self.new = self.folder / "new"
        self._old = self.folder / "old"
        self._journal = self.folder / ".tnmoe-journal"

    @contextmanager
    def alone(self) -> Iterator[str | None]:
        """Keep other processes from the work while the block runs, and go on where one died.

        Yields
        ------
        str or None
            What an earlier process put in place, if it died before it could say so.

        Raises
        ------
        InputError
            If another process is at work there, the place cannot be written to, or something else
            is in the way.
        """
        missing = [each for each in self.folder.parents if not each.exists()]
        made = (self.new, self._old)
        self._check_place(*made)
        try:
            with locked(self.folder / ".tnmoe-lock", str(self.target)):
                # These folders are made after the journal and removed before it.
                self._check_place(*(made if self._journal.is_file() else ()))
                for folder in missing:
                    sync(folder.parent)
                yield self._settle()
        finally:
            # What was made for this alone goes; a folder that holds something cannot be removed.
            with suppress(OSError):
                for folder in (self.folder, *missing):
                    folder.rmdir()

    def _check_place(self, *folders: Path) -> None:
        """Raise an InputError if there is anything but these folders and files of this class."""
        try:
            names = set(os.listdir(self.folder)) - {folder.name for folder in folders}
        except FileNotFoundError:
            names = set()
        except NotADirectoryError:
            # The folder itself, or what should hold it, is a file.
            names = {self.folder.name} if self.folder.exists() else set()
        if self.folder.is_symlink() or not all(_is_ours(name) for name in names):
            raise InputError(f"{self.folder} is in the way")

    def begun(self) -> list[str]:
        """Lines of the journal: what is being made, and what of it is done."""
        return _lines(self._journal)

    @property
    def is_whole(self) -> bool:
        """Whether the new folder has all that it is to have."""
        return self.begun()[-1:] == [_WHOLE] and self.new.is_dir()

    def begin(self, purpose: str) -> None:
        """Make the new folder, empty, and the journal."""
        self.discard()
        try:
            sync(self.folder.parent)
            write_whole(self._journal, _as_text([purpose]))
            self.new.mkdir()
            sync(self.folder)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def go_on(self) -> None:
        """Prepare to add to the journal: a line that broke off goes."""
        write_whole(self._journal, _as_text(self.begun()))

    def note(self, line: str) -> None:
        """Add a line to the journal; what it tells of has to be on the disk by now."""
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        sync(self._journal)

    def discard(self) -> None:
        """Remove the new folder and the journal."""
        if self.new.exists() or self._old.exists():
            if self._journal.exists():
                os.truncate(self._journal, 0)  # whoever is stopped here has begun nothing
                sync(self._journal)
            if self.new.exists():
                shutil.rmtree(self.new)
                sync(self.folder)
        if not self._old.exists():
            # Also what is left of a journal that broke off while it was written.
            for path in self.folder.glob(f"*{self._journal.name}*"):
                path.unlink()
        sync(self.folder)

    def put_in_place(self, overwrite: bool) -> None:
        """Move the new folder to the target; what was there goes once the new one is in place.

        What appeared there meanwhile is never replaced, nor what tnmoe did not write.

        Parameters
        ----------
        overwrite : bool
            Replace what tnmoe wrote there.

        Raises
        ------
        InputError
            If something to keep is there.
        OSError
            If moving fails. In both cases the target is as it was, and the work remains.
        """
        if not self.is_whole:
            write_record(self.new)
            self.note(_WHOLE)
        check_target(self.target, overwrite)
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                self.target.rename(self._old)
                # Something may have come since the check; nothing comes to a folder that is away.
                check_recorded(self.target, self._old)
            self._move()
        except BaseException as failure:
            self._put_back(failure)
            raise
        self._settle()

    def _move(self) -> None:
        try:
            _rename(self.new, self.target)
        except OSError:
            check_target(self.target, overwrite=False)
            raise

    def _put_back(self, failure: BaseException) -> None:
        if not (self._old.exists() and self.new.exists()):
            return
        try:
            _rename(self._old, self.target)
        except OSError:
            raise InputError(
                f"{self.target} could not be replaced ({failure}), nor put back: "
                f"it is now {self._old}"
            ) from failure

    def _settle(self) -> str | None:
        """Finish the moving of folders, and tell what is in place now."""
        begun = self.begun()
        moved = begun[-1:] == [_WHOLE] and not self.new.exists()
        if moved:
            self._sync_names()  # before the only other copy goes
        if self._old.exists():
            if moved:
                remove_recorded(self._old)
            elif self.target.exists():
                raise InputError(f"{self._old} is what {self.target} was before: move it away")
            else:
                _rename(self._old, self.target)
            self._sync_names()
        if not moved:
            return None
        self.discard()
        return begun[0] if self.target.is_dir() else None

    def _sync_names(self) -> None:
        """Wait until it is on the disk which folder is where."""
        sync(self.folder)
        sync(self.target.parent)


def _is_ours(name: str) -> bool:
    return name.lstrip(".").startswith("tnmoe-")


def _rename(folder: Path, target: Path) -> None:
    """Rename a folder; nothing is replaced but an empty folder, and an OSError says so."""
    try:
        folder.rename(target)
    except FileExistsError:
        target.rmdir()  # Windows does not replace an empty folder either
        folder.rename(target)


def _lines(journal: Path) -> list[str]:
    """Whole lines of a journal: one that was being written when the work broke off is none."""
    if not journal.is_file() or journal.stat().st_size > _LARGEST:
        return []
    return journal.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _as_text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
