"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from tnmoe.errors import InputError


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to fill, renamed to ``target`` when the block ends well.

    On any exception the sibling is removed and ``target`` stays as it was.

    Parameters
    ----------
    target : Path
        Folder to make.
    overwrite : bool
        Replace a folder that holds something already.

    Yields
    ------
    Path
        The folder to write to.

    Raises
    ------
    InputError
        If ``target`` cannot be made, is a file, or is not empty and ``overwrite`` is not given.
    """
    target = target.absolute()
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty: choose another folder or give --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
        sibling = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}") from error
    try:
        sibling.chmod(0o755)  # mkdtemp keeps others out; a finished folder is an ordinary one
        yield sibling
        _swap(sibling, target)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; what was there goes only once ``new`` is in its place."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    target.rename(old / "old")
    try:
        new.rename(target)
    except BaseException:
        (old / "old").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
