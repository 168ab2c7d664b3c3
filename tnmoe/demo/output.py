"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from tnmoe.errors import InputError
from tnmoe.folders import check_target, move_into_place


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
    check_target(target, overwrite)
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
        move_into_place(sibling, target)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
