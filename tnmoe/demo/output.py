"""The output folder of the demo, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.folders import check_target
from tnmoe.system.unfinished import UnfinishedFolder

# Marks unfinished folders of the demo, as opposed to those of conversions.
_PURPOSE = "tnmoe demo"


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Provide a new folder, and move it to ``target`` when the block ends without an exception.

    After an exception, the new folder is removed and ``target`` stays as it was. If the block
    succeeds and the move fails, the new folder is kept and the message names it.

    Parameters
    ----------
    target : Path
        Folder to create.
    overwrite : bool
        Replace files that tnmoe wrote there.

    Yields
    ------
    Path
        The folder to write to.

    Raises
    ------
    InputError
        If ``target`` cannot be created, is a file, or is being written by another process; if it
        is not empty and ``overwrite`` is False; or if it holds files that tnmoe did not write.
    """
    unfinished = UnfinishedFolder(target)
    with unfinished.lock():
        check_target(unfinished.target, overwrite)
        if unfinished.journal()[:1] not in ([], [_PURPOSE]) and not overwrite:
            raise InputError(
                f"{unfinished.partial} is an unfinished conversion: remove it, or pass "
                "overwrite=True (--overwrite)"
            )
        unfinished.begin(_PURPOSE)
        try:
            yield unfinished.new
        except BaseException:
            unfinished.discard()
            raise
        try:
            unfinished.move_to_target(overwrite)
        except InputError as error:
            raise InputError(f"{error}; the results are in {unfinished.new}") from error
