"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from uuid import uuid4

from tnmoe.errors import InputError


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file through a sibling that takes its place, durably; on failure nothing is left."""
    sibling = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(sibling, "xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


def check_target(target: Path, overwrite: bool) -> None:
    """Raise an InputError if a folder cannot be made there: a file, or things to keep, are."""
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(
            f"{target} is not empty: choose another folder, or pass overwrite=True (--overwrite)"
        )
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a folder")


def move_into_place(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; what was there goes only once ``new`` is in its place.

    Raises
    ------
    OSError
        If that fails; everything is as it was.
    InputError
        If it fails and what was there cannot be put back; the message tells where it is.
    """
    if not target.exists():
        new.rename(target)
        return
    kept = Path(mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    old = kept / "old"
    try:
        target.rename(old)
        new.rename(target)
    except BaseException as failure:
        if old.exists():
            _put_back(old, target, failure)
        kept.rmdir()
        raise
    shutil.rmtree(kept, ignore_errors=True)


def _put_back(old: Path, target: Path, failure: BaseException) -> None:
    try:
        old.rename(target)
    except OSError:
        raise InputError(
            f"{target} could not be replaced ({failure}), nor put back: it is now {old}"
        ) from failure
