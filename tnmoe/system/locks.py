"""Locks that admit a single process at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tnmoe.errors import InputError, reason_of

# Attempts to make the folder of a lock: another process may remove it when its own work ends.
_ATTEMPTS = 100

# Characters of an owner's name that a message shows, at most.
_NAME_LENGTH = 200


@contextmanager
def locked(path: Path, resource: str, wait: float = 0) -> Iterator[None]:
    """Hold a lock while the block runs; raise if another process holds it.

    The operating system frees the lock of a process that ends, however it ends. On a file system
    without locks, the existence of the file is the lock; a lock that a dead process of this
    machine left is taken over.

    Parameters
    ----------
    path : Path
        File that stands for the lock; it is removed in the end. Its folder is made if needed.
    resource : str
        Name of what the lock protects, for messages.
    wait : float
        Seconds to wait for the other process.

    Raises
    ------
    InputError
        If another process, or this one, holds the lock (the message names the process), or the
        file cannot be made.
    """
    lock = FileLock(path)
    owner = path.with_name(f"{path.name}-owner")
    _acquire(lock, path, owner, resource, wait)
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        name = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        with suppress(OSError):  # on a full disk the lock holds without a name
            owner.unlink(missing_ok=True)  # a pipe of that name would wait for a reader
            owner.write_text(name, "utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
            # Before the release: after it, the file may be another process's.
            path.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, path: Path, owner: Path, resource: str, wait: float) -> None:
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait)
            return
        except Timeout as error:
            name = "another process"
            with suppress(OSError):
                name = _owner_name(owner) or name
            raise InputError(f"{resource} is in use by {name}: wait, or stop it") from error
        except OSError as error:
            # The last holder may have removed the folder between these two lines, or within mkdir.
            if not (attempts_left and isinstance(error, FileNotFoundError | FileExistsError)):
                raise InputError(f"cannot write to {path.parent}: {reason_of(error)}") from error


def _owner_name(path: Path) -> str:
    """Return the name that the holder of a lock wrote; empty without a regular file."""
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_NAME_LENGTH)
