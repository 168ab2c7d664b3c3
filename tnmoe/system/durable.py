"""Files written to disk so that a crash or a power cut leaves the old contents or the new."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from tnmoe.errors import InputError

# Answers of systems that cannot sync a folder: Windows and some network file systems.
_NO_SYNC = {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk.

    A folder that the system cannot sync is left alone.

    Raises
    ------
    OSError
        If the disk fails.
    """
    is_folder = path.is_dir()
    try:
        # Windows syncs only files that are open for writing.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_SYNC):
            raise


def write_atomically(path: Path, contents: bytes) -> None:
    """Write a file durably, whole or not at all.

    The bytes go to a new file beside it, which then takes its place. On failure, the new file is
    removed. If ``path`` is a link, the file that it leads to is written and the link stays.

    Raises
    ------
    OSError
        If the file cannot be written.
    InputError
        If ``path`` is a device, a pipe or the like.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is not a regular file")
    sibling = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(sibling, "xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
        sync(path.parent)
    except BaseException as error:
        sibling.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise


def write_json(path: Path, data: Any, *, sort_keys: bool = False) -> None:
    """Write indented JSON, as Hugging Face does, durably and whole or not at all."""
    text = json.dumps(data, indent=2, sort_keys=sort_keys)
    write_atomically(path, f"{text}\n".encode())
