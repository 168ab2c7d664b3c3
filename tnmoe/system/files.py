"""Files that others may have written: looked at before they are opened, and read up to a limit."""

from __future__ import annotations

import json
import os
from stat import S_ISDIR, S_ISFIFO, S_ISREG
from typing import Any

from tnmoe.errors import InputError, shown

# Bytes of JSON: safetensors allows as many of a header.
_LARGEST_JSON = 100_000_000


def check_ordinary(path: str | os.PathLike, pipes: bool = False) -> None:
    """Raise an InputError unless a file is an ordinary one; links are followed.

    A pipe would be waited for, and a device may have no end.

    Parameters
    ----------
    path : path
    pipes : bool
        Whether it may be a pipe, too: where users themselves name it.

    Raises
    ------
    OSError
        If there is no file of that name.
    """
    mode = os.stat(path).st_mode
    if not (S_ISREG(mode) or (pipes and S_ISFIFO(mode))):
        kind = "a folder" if S_ISDIR(mode) else "no ordinary file"
        raise InputError(f"{os.fspath(path)} is {kind}")


def read_json(path: str | os.PathLike, pipes: bool = False) -> dict[str, Any]:
    """The JSON object that a file holds.

    Parameters
    ----------
    path : path
    pipes : bool
        Whether it may be a pipe, too: where users themselves name it.

    Raises
    ------
    InputError
        If it holds no JSON object, has more than 100 MB, or is not an ordinary file.
    OSError
        If it cannot be read.
    """
    if not pipes:
        check_ordinary(path)
    check_json_size(path)
    with open(path, "rb", opener=_at_once) as file:
        contents = file.read(_LARGEST_JSON + 1)
    if len(contents) > _LARGEST_JSON:
        raise InputError(f"{path} does not end, or grows")
    data = parsed(contents, path)
    if not isinstance(data, dict):
        raise InputError(f"{path} should hold a JSON object, got {type(data).__name__}")
    return data


def read_header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of the right size, and where its numbers begin.

    What else is wrong with it, safetensors finds; but that maps the whole file, which may be as
    long as no disk is.

    Raises
    ------
    InputError
        If it is no ordinary file, or no such file.
    OSError
        If it cannot be read.
    """
    check_ordinary(path)
    damaged = f"{os.fspath(path)} is damaged or no safetensors file"
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if start > min(8 + _LARGEST_JSON, size):
            raise InputError(f"{damaged}: its header is to have {start - 8:,} bytes")
        header = parsed(file.read(start - 8), damaged)
    try:
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = start + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (AttributeError, LookupError, TypeError):
        raise InputError(f"{damaged}: its header has another form") from None
    if end != size:
        raise InputError(f"{damaged}: it has {size:,} bytes, and by its header {shown(end)}")
    return header, start


def check_json_size(path: str | os.PathLike) -> None:
    """Raise an InputError for a file that is to hold JSON and has more bytes than any needs."""
    if os.stat(path).st_size > _LARGEST_JSON:
        raise InputError(f"{path} has more than {_LARGEST_JSON:,} bytes, which no JSON needs here")


def _at_once(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes into is empty, and not waited for."""
    if os.name == "nt":
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def parsed(text: str | bytes, what: object) -> Any:
    """What JSON says; an InputError that names ``what`` if it is none.

    Also one for numbers of thousands of digits, and for lists in lists in lists.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError as error:  # of characters, of JSON and of digits
        raise InputError(f"{what} is not JSON: {error}") from error
