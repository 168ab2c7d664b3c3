"""Output folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp

from tnmoe.errors import InputError


def check_target(target: Path, overwrite: bool) -> None:
    """Raise an InputError if a folder cannot be made there: a file, or things to keep, are."""
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty: choose another folder or give --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a folder")


def move_into_place(new: Path, target: Path) -> None:
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
