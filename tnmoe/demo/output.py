"""An output folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.folders import check_target
from tnmoe.system.unfinished import UnfinishedFolder

_PURPOSE = "tnmoe demo"


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well.

    On any exception it is removed and ``target`` stays as it was. If it cannot take its place in
    the end, it is kept, and the message says where.

    Parameters
    ----------
    target : Path
        Folder to make.
    overwrite : bool
        Replace what tnmoe wrote there.

    Yields
    ------
    Path
        The folder to write to.

    Raises
    ------
    InputError
        If ``target`` cannot be made, is a file, is being made by another process, is not empty
        and ``overwrite`` is not given, or holds what tnmoe did not write there.
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
