"""Reading files of unknown origin: only regular files, and only up to a size limit."""

from __future__ import annotations

import json
import os
from stat import S_ISDIR, S_ISFIFO, S_ISREG
from typing import Any

from tnmoe.errors import InputError, short_repr

# Largest JSON text in bytes; safetensors has the same limit for headers.
_MAX_JSON_BYTES = 100_000_000

# A safetensors file begins with the length of its header, in this many bytes.
_LENGTH_BYTES = 8


def check_regular_file(path: str | os.PathLike, pipes: bool = False) -> None:
    """Raise an InputError unless a path leads to a regular file.

    Reading a pipe would wait for a writer, and a device may have no end.

    Parameters
    ----------
    path : path
        Links are followed.
    pipes : bool
        Accept a pipe, too: for files that users name themselves.

    Raises
    ------
    OSError
        If the file does not exist.
    """
    mode = os.stat(path).st_mode
    if not (S_ISREG(mode) or (pipes and S_ISFIFO(mode))):
        kind = "a folder" if S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{os.fspath(path)} is {kind}")


def read_json(path: str | os.PathLike, pipes: bool = False) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Parameters
    ----------
    path, pipes
        As for :func:`check_regular_file`.

    Raises
    ------
    InputError
        If the file holds no JSON object, has more than 100 MB, or is not a regular file.
    OSError
        If the file cannot be read.
    """
    if not pipes:
        check_regular_file(path)
    check_json_size(path)
    with open(path, "rb", opener=_open_without_waiting) as file:
        contents = file.read(_MAX_JSON_BYTES + 1)
    if len(contents) > _MAX_JSON_BYTES:
        raise InputError(f"{path} is endless, or grows while it is read")
    data = parse_json(contents, path)
    if not isinstance(data, dict):
        raise InputError(f"{path} should hold a JSON object, got {type(data).__name__}")
    return data


def read_safetensors_header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the offset in bytes at which its numbers begin.

    The checks here are those that have to precede safetensors' own, which map the whole file: a
    file may claim a length that no disk has.

    Raises
    ------
    InputError
        If it is not a regular file, not a safetensors file, or of another size than its header
        describes.
    OSError
        If the file cannot be read.
    """
    check_regular_file(path)
    damaged = f"{os.fspath(path)} is damaged or not a safetensors file"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        size = os.fstat(file.fileno()).st_size
        if length > min(_MAX_JSON_BYTES, size - _LENGTH_BYTES):
            raise InputError(f"{damaged}: it announces a header of {length:,} bytes")
        header = parse_json(file.read(length), damaged)
    start = _LENGTH_BYTES + length
    try:
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = start + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (AttributeError, LookupError, TypeError):
        raise InputError(f"{damaged}: its header is malformed") from None
    if end != size:
        raise InputError(
            f"{damaged}: it has {size:,} bytes, its header describes {short_repr(end)}"
        )
    return header, start


def check_json_size(path: str | os.PathLike) -> None:
    """Raise an InputError if a file has more bytes than any JSON that tnmoe reads."""
    if os.stat(path).st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path} has more than {_MAX_JSON_BYTES:,} bytes, too many for JSON")


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe without a writer counts as empty."""
    if os.name == "nt":
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def parse_json(text: str | bytes, source: object) -> Any:
    """Parse JSON.

    Parameters
    ----------
    text : str or bytes
    source : object
        What the message of an error calls the text.

    Raises
    ------
    InputError
        If the text is not JSON, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{source} is nested too deeply") from None
    except ValueError as error:  # from UTF-8, from JSON or from the limit on digits
        raise InputError(f"{source} is not JSON: {error}") from error
