"""Work that one process does at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tnmoe.errors import InputError, reason

# To make a lock's folder, which others remove when they are done.
_TRIES = 100

# Characters of an owner's name at most.
_NAME = 200


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock while the block runs, or refuse at once.

    The operating system frees the lock of a process that ends, however it ends. Where a file
    system has no locks, the file itself is the lock, and one of a process that has died on this
    machine is taken over.

    Parameters
    ----------
    path : Path
        File that stands for the lock; it is removed in the end. Its folder is made.
    what : str
        What is locked, for the message.

    Raises
    ------
    InputError
        If another process, or this one, holds it, and the message names the process; if there
        can be no such file.
    """
    lock = FileLock(path)
    owner = path.with_name(f"{path.name}-owner")
    _acquire(lock, path, owner, what)
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        name = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        with suppress(OSError):  # on a full disk it holds without a name
            owner.unlink(missing_ok=True)  # whatever it is: a pipe would wait for a reader
            owner.write_text(name, "utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # while it is held: later it may be another's
        lock.release()


def _acquire(lock: FileLock, path: Path, owner: Path, what: str) -> None:
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            return
        except Timeout as error:
            name = "another process"
            with suppress(OSError):
                name = _start_of(owner) or name
            raise InputError(f"{what} is in use by {name}: wait, or stop it") from error
        except OSError as error:
            # Whoever held the lock may have removed its folder just now, also while it was made.
            if not (left and isinstance(error, FileNotFoundError | FileExistsError)):
                raise InputError(f"cannot write to {path.parent}: {reason(error)}") from error


def _start_of(path: Path) -> str:
    """The first characters of an ordinary file; of anything else there are none."""
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_NAME)
