"""Corruption of files: of their bytes, of a safetensors header, or of their kind."""

import json
import os
import socket
import struct
from pathlib import Path
from random import Random

from tests.hostile.values import EXTREMES, corrupted_json


def corrupt_folder(folder: Path, rng: Random) -> str:
    """Corrupt one or two files of a folder, and return a description."""
    descriptions = []
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        files = sorted(
            path for path in folder.iterdir() if path.is_file() and not path.is_symlink()
        )
        if files:
            # A config.json has the most entries that can be wrong.
            weights = [4 if path.name == "config.json" else 1 for path in files]
            (path,) = rng.choices(files, weights)
            descriptions.append(f"{path.name}: {corrupt_file(path, rng)}")
    return "; ".join(descriptions)


def corrupt_file(path: Path, rng: Random) -> str:
    """Corrupt a file in a way that suits its format, and return a description."""
    with open(path, "rb") as file:
        start = file.read(9)
    # In a safetensors file, the header in braces follows eight bytes with its length.
    by_format = [_json] * 8 if start[:1] == b"{" else [_header] * 4 if start[8:] == b"{" else []
    change = rng.choice([_bytes, _kind, *by_format])
    try:
        return f"{change.__name__}, {change(path, rng)}"
    except Exception:  # an earlier corruption left no format
        return "no format"


def _json(path: Path, rng: Random) -> str:
    text = corrupted_json(json.loads(path.read_text()), rng)
    path.write_text(text)
    return text[:100]


def _bytes(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes())
    # Most of a file of weights are numbers, of which any value is valid.
    end = 8 + min(len(data), int.from_bytes(data[:8], "little"), 4000)
    change = rng.choice(("flip", "cut", "extend", "insert", "length"))
    if change == "flip":
        for _ in range(rng.choice((1, 1, 10))):
            data[rng.randrange(min(end, len(data)))] = rng.randrange(256)
    elif change == "cut":
        del data[rng.randrange(len(data)) :]
    elif change == "extend":
        data += rng.choice((b"\0", b"}", b"x" * 1000))
    elif change == "insert":
        place = rng.randrange(min(end, len(data)))
        data[place:place] = rng.choice((b"\0", b"\xff", b"9" * 50, b'"', b"[" * 50_000))
    else:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**63, 2**64 - 1)))
    path.write_bytes(data)
    return change


def _header(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    change = rng.choice(("json", "shape", "dtype", "offsets", "swap", "lose", "copy", "metadata"))
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    if change == "shape":
        entry["shape"] = rng.choice((
            entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1], [0], [],
            [2**62, 2**62, 0], [2**32, 2**32], [-1], [2**64], list(range(1, 3000)), [1] * 3000,
        ))  # fmt: skip
    elif change == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "")
        )
    elif change == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([begin, end + 1], [end, begin], [begin + 1, end + 1], [0, 2**63], [-1, end], [0, 0])
        )
    elif change == "swap":
        header[name], header[other] = header[other], header[name]
    elif change == "lose":  # the numbers go too, so that the file stays intact
        begin, end = header.pop(name)["data_offsets"]
        numbers = numbers[:begin] + numbers[end:]
        for later in header.values():
            if (offsets := later.get("data_offsets")) and offsets[0] >= end:
                later["data_offsets"] = [offset - (end - begin) for offset in offsets]
    elif change == "copy":
        header[rng.choice(("x", "", name.upper(), "n" * 5000, "a\nb"))] = entry
    elif change == "metadata":
        header["__metadata__"] = {"format": "pt"} | _metadata(header.get("__metadata__", {}), rng)
    text = (corrupted_json(header, rng) if change == "json" else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return f"{change} of {name}"


def _metadata(metadata: dict[str, str], rng: Random) -> dict[str, str]:
    """Return changed metadata. All values are texts; that of tnmoe is JSON."""
    name = rng.choice(["format", *metadata])
    if name == "tnmoe":
        return metadata | {name: corrupted_json(json.loads(metadata[name]), rng)}
    return metadata | {name: str(rng.choice(EXTREMES[:8]))}


def _kind(path: Path, rng: Random) -> str:
    """Replace a file by something of another kind, and return its name."""
    kind = rng.choice(
        ("nothing", "empty", "folder", "pipe", "socket", "zero", "loop", "outside", "sparse")
    )
    data = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        _socket(path)
    elif kind in ("zero", "loop"):
        path.symlink_to("/dev/zero" if kind == "zero" else path)
    elif kind == "outside":
        elsewhere = path.parent.with_name(f"{path.parent.name}-outside")
        elsewhere.write_bytes(data)
        path.symlink_to(elsewhere)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write(data)
            file.truncate(2**41)
    return kind


def _socket(path: Path) -> None:
    """Make a socket's file from its folder, since its path may have 108 bytes at most."""
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)
