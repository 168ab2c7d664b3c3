"""Hugging Face folders read and written tensor by tensor: never more of a model than one at a time.

The format is safetensors: eight bytes with the length of a header, the header as JSON (every
tensor's dtype, shape and place), then the numbers one after another.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.system.durable import sync, write_atomically
from tnmoe.system.files import check_json_size, read_json, read_safetensors_header
from tnmoe.system.memory import explain_memory_error

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"

# Where PEFT tells of adapters.
ADAPTERS = "adapter_config.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Where config.json may name the file of weights, or their index.
_NAMED = "transformers_weights"

# Files of these kinds are read of a folder.
_READ = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")

# Bytes that are copied at a time.
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor: its dtype, by safetensors' name, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Of a tensor on any device, meta too."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.itemsize)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return _DTYPES[self.dtype]

    @property
    def num_params(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one number; those smaller than a byte count as one."""
        return max(1, self.num_bytes // max(1, self.num_params))


@dataclass(frozen=True)
class TensorLocation:
    """Where the numbers of a tensor are: the file, and how many bytes into it."""

    path: Path
    offset: int


class Checkpoint:
    """The tensors of a folder that holds config.json and safetensors files.

    Only headers are read until a tensor is asked for.

    Parameters
    ----------
    folder : Path
    variant : str, optional
        Of the weights, as transformers calls it: ``fp16`` for ``model.fp16.safetensors``.

    Attributes
    ----------
    config : dict
        Contents of config.json, but for the name of the weights.
    specs : dict from str to Spec
        Every tensor by name, in the order of the files.
    places : dict from str to TensorLocation

    Raises
    ------
    InputError
        If the folder is no such folder, a file is missing, damaged or outside of it, or tensors
        are not where the index says. Pickled weights are never read.
    """

    def __init__(self, folder: str | os.PathLike, variant: str | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._states = states_of([self.folder / CONFIG])
        self.config = read_config(self.folder)
        self.specs: dict[str, Spec] = {}
        self.places: dict[str, TensorLocation] = {}
        weights = _weights(self.folder, self.config.pop(_NAMED, None), variant)
        self._states |= states_of([weights])
        index = self._index(weights)
        files = [inside(self.folder, file) for file in sorted(set(index.values()))]
        for path in files or [weights]:
            self._states |= states_of([path])
            for name, spec, offset in _header(path):
                if name in self.specs:
                    raise InputError(f"{path} and {self.places[name].path} both hold {name}")
                self.specs[name], self.places[name] = spec, TensorLocation(path, offset)
        if absent := sorted(set(index) - set(self.specs)):
            raise InputError(
                f"{weights} lists {len(absent)} tensors that its files lack: "
                f"{', '.join(absent[:4])}"
            )
        for name, file in index.items():
            if self.places[name].path != self.folder / file:
                raise InputError(f"{name} is not in {file}, where the index puts it")

    def _index(self, path: Path) -> dict[str, str]:
        """Which file holds which tensor, if the folder has several."""
        if path.suffix != ".json":
            return {}
        index = read_json(path).get("weight_map")
        names = isinstance(index, dict) and all(isinstance(f, str) for f in index.values())
        if not index or not names:
            raise InputError(f"{path} has no weight_map from tensors to files")
        return index

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_params(self) -> int:
        """Numbers in all tensors."""
        return sum(spec.num_params for spec in self.specs.values())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another one, or from itself after a change."""
        # The same files may be on another device later, and have other numbers there.
        files = [[path.name, state[2:]] for path, state in sorted(self._states.items())]
        return {"config": self.config, "files": files}

    def check_unchanged(self) -> None:
        """Raise an InputError if a file is another one by now, or is gone."""
        if path := changed(self._states):
            raise InputError(f"{path} has changed since it was first read")

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises
        ------
        InputError
            If its file has become shorter.
        """
        spec, place = self.specs[name], self.places[name]
        data = bytearray(spec.num_bytes)
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            if file.readinto(data) < spec.num_bytes:
                raise InputError(f"{place.path} ends within {name}")
        if not data:
            return torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[spec.dtype]).reshape(spec.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, a few at a time."""
        spec, place = self.specs[name], self.places[name]
        left = spec.num_bytes
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            while left:
                data = file.read(min(left, _CHUNK))
                if not data:
                    raise InputError(f"{place.path} ends within {name}")
                left -= len(data)
                yield data


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of a folder's config.json, or of such a file itself."""
    if folder.is_file():
        return read_json(folder)
    check_folder(folder)
    return read_json(inside(folder, CONFIG))


def check_folder(folder: Path) -> None:
    """Raise an InputError unless this is a folder with a config.json."""
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a folder")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} is not a Hugging Face folder: no config.json there")


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder, unless it lies elsewhere.

    Links are followed within the folder, and from a snapshot of the Hugging Face cache to the
    files that it is made of.

    Raises
    ------
    InputError
        If it lies elsewhere, or is not there.
    """
    path = folder / name
    if not os.path.exists(path):  # also no name that is too long for any file
        raise InputError(f"{path} is missing")
    real = folder.resolve()
    blobs = [
        each.parent / "blobs"
        for each in real.parents
        if each.name == "snapshots" and each.parent.name.startswith("models--")
    ]
    if not any(path.resolve().is_relative_to(each) for each in (real, *blobs)):
        raise InputError(
            f"{path} leads out of the folder: refused; put the file itself there (cp -rL copies a "
            "folder with what its links lead to)"
        )
    return path


def check_inside(folder: Path) -> None:
    """Raise an InputError if a file that transformers may read of a folder lies elsewhere."""
    for path in folder.iterdir():
        if path.suffix in _READ and path.is_symlink() and path.exists():
            inside(folder, path.name)
        if path.suffix == ".json" and path.exists():
            check_json_size(path)
    for index in folder.glob("*.index*.json"):
        files = read_json(index).get("weight_map")
        for file in set(map(str, files.values())) if isinstance(files, dict) else ():
            if os.path.exists(folder / file):  # an index may outlive its files
                inside(folder, file)


def parts_of_ranks(folder: Path) -> list[Path]:
    """Files of a distributed checkpoint, which transformers prefers to all others."""
    return sorted(folder.glob("shard-*-model-*-of-*.safetensors"))


def _of_variant(name: str, variant: str | None) -> str:
    base, _, kind = name.rpartition(".")
    return name if variant is None else f"{base}.{variant}.{kind}"


def _weights(folder: Path, named: Any, variant: str | None) -> Path:
    """The file of weights, or the index of several, that transformers takes.

    Parameters
    ----------
    folder : Path
    named : str, optional
        What config.json says.
    variant : str, optional
        ``fp16`` for ``model.fp16.safetensors``.
    """
    if parts := parts_of_ranks(folder):
        raise InputError(f"{parts[0]} is what one process of several had: save the whole model")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".index.json")):
            raise InputError(f"{folder / CONFIG} names no safetensors file as {_NAMED}: {named!r}")
        return inside(folder, named)
    single, index = (_of_variant(name, variant) for name in (SINGLE, INDEX))
    for name in (single, index):
        if (folder / name).exists():
            return inside(folder, name)
    pickled = sorted(each.name for each in folder.iterdir() if each.suffix in (".bin", ".pt"))
    instead = f"; {pickled[0]} is a pickle, which is never read" if pickled else ""
    raise InputError(f"{folder} has no {single} and no {index}{instead}")


def states_of(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """What of each file changes when it is written to or replaced; nothing if it is not there."""
    return {path: _state(path) for path in paths}


def changed(states: Mapping[Path, tuple[int, ...]]) -> Path | None:
    """A file that changed since :func:`states_of`, if any did."""
    return next((path for path, then in states.items() if _state(path) != then), None)


def _state(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    # The last one, unlike the time of its contents, is not for programs to set.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _header(path: Path) -> Iterator[tuple[str, Spec, int]]:
    """Name, spec and offset of every tensor of a file, once the library has found it sound."""
    header, start = read_safetensors_header(path)
    try:
        with explain_memory_error(f"reading the header of {path}"), safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, Spec(entry["dtype"], tuple(entry["shape"]), end - begin), start + begin


class ShardWriter:
    """Safetensors files of a size that is known before any number is, filled in any order.

    Parameters
    ----------
    folder : Path
        Where they go.
    specs : mapping from str to Spec
        The tensors, in order.
    limit : int
        Bytes of a file at most, except where a single tensor has more.

    Attributes
    ----------
    num_bytes : int
        Bytes of all numbers.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], limit: int) -> None:
        self._folder, self._specs = folder, specs
        self.num_bytes = sum(spec.num_bytes for spec in specs.values())
        shards = list(_packed(specs, limit))
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]  # fmt: skip
        self._places: dict[str, TensorLocation] = {}
        self._headers: dict[Path, tuple[bytes, int]] = {}
        for file, shard in zip(names, shards, strict=True):
            self._lay_out(folder / file, shard)

    def _lay_out(self, path: Path, names: Iterable[str]) -> None:
        # The widest numbers first, so that all of them are aligned.
        ordered = sorted(names, key=lambda name: -self._specs[name].item_bytes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in ordered:
            spec = self._specs[name]
            end = begin + spec.num_bytes
            header[name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end],
            }  # fmt: skip
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._headers[path] = struct.pack("<Q", len(text)) + text, start + begin
        for name in ordered:
            self._places[name] = TensorLocation(path, start + header[name]["data_offsets"][0])

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return list(self._headers)

    def create(self) -> None:
        """Make the files on the disk, with their headers and room for the numbers."""
        for path, (header, size) in self._headers.items():
            with open(path, "wb") as file:
                file.write(header)
                file.truncate(size)
            sync(path)
        sync(self._folder)

    def write(self, tensors: Mapping[str, Tensor | Iterable[bytes]]) -> None:
        """Put tensors, or their bytes, in their places, and wait until they are on the disk."""
        with ExitStack() as opened:
            files: dict[Path, BinaryIO] = {}
            for name, tensor in tensors.items():
                place = self._places[name]
                if place.path not in files:
                    files[place.path] = opened.enter_context(open(place.path, "r+b"))
                file = files[place.path]
                file.seek(place.offset)
                for chunk in self._bytes_of(name, tensor):
                    file.write(chunk)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())

    def _bytes_of(self, name: str, tensor: Tensor | Iterable[bytes]) -> Iterable[Any]:
        if not isinstance(tensor, Tensor):
            return tensor
        if Spec.of(tensor) != self._specs[name]:
            raise ValueError(f"{name} was to be {self._specs[name]}, got {Spec.of(tensor)}")
        return [tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data]

    def write_index(self) -> None:
        """Say which file holds which tensor, if there are several."""
        if len(self._headers) == 1:
            return
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {name: place.path.name for name, place in sorted(self._places.items())},
        }
        write_json(self._folder / INDEX, index)


def _packed(specs: Mapping[str, Spec], limit: int) -> Iterator[list[str]]:
    """Names in order, in lists whose tensors have ``limit`` bytes at most."""
    shard: list[str] = []
    size = 0
    for name, spec in specs.items():
        if shard and size + spec.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += spec.num_bytes
    yield shard


def write_json(path: Path, data: Any) -> None:
    """Write JSON as Hugging Face does, whole or not at all."""
    write_atomically(path, f"{json.dumps(data, indent=2)}\n".encode())
