"""Safetensors files whose sizes are fixed first, and whose tensors are written in any order."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tnmoe.hf.files.folder import INDEX, SINGLE
from tnmoe.hf.files.tensors import TensorLocation, TensorSpec, total_bytes
from tnmoe.system.durable import sync, write_json

# Headers end at multiples of this many bytes, so that the numbers after them are aligned.
_ALIGNMENT = 8


class ShardWriter:
    """A writer of tensors into safetensors files of limited size.

    Parameters
    ----------
    folder : Path
        Where the files go.
    specs : mapping from str to TensorSpec
        The tensors, in order.
    limit : int
        Bytes of numbers in a file, at most; a file with a single tensor may have more.

    Attributes
    ----------
    num_bytes : int
        Bytes of all numbers.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], limit: int) -> None:
        self._folder, self._specs = folder, specs
        self.num_bytes = total_bytes(specs.values())
        shards = list(_packed(specs, limit))
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]  # fmt: skip
        self._locations: dict[str, TensorLocation] = {}
        # First bytes and size of each file.
        self._headers: dict[Path, tuple[bytes, int]] = {}
        for file, shard in zip(names, shards, strict=True):
            self._lay_out(folder / file, shard)

    def _lay_out(self, path: Path, names: Iterable[str]) -> None:
        """Decide where in a file its tensors go."""
        # Tensors with the widest elements come first, so that all tensors are aligned.
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
        text += b" " * (-len(text) % _ALIGNMENT)
        first_bytes = struct.pack("<Q", len(text)) + text
        self._headers[path] = first_bytes, len(first_bytes) + begin
        for name in ordered:
            offset = len(first_bytes) + header[name]["data_offsets"][0]
            self._locations[name] = TensorLocation(path, offset)

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return list(self._headers)

    def create(self) -> None:
        """Make the files with their headers and their full sizes."""
        for path, (first_bytes, size) in self._headers.items():
            with open(path, "wb") as file:
                file.write(first_bytes)
                file.truncate(size)
            sync(path)
        sync(self._folder)

    def write(self, tensors: Mapping[str, Tensor | Iterable[bytes]]) -> None:
        """Write tensors, or their bytes, and wait until they are on the disk."""
        with ExitStack() as opened:
            files: dict[Path, BinaryIO] = {}
            for name, tensor in tensors.items():
                location = self._locations[name]
                if location.path not in files:
                    files[location.path] = opened.enter_context(
                        open(location.path, "wb", opener=_open_in_place)
                    )
                file = files[location.path]
                file.seek(location.offset)
                for chunk in self._bytes_of(name, tensor):
                    file.write(chunk)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())

    def _bytes_of(self, name: str, tensor: Tensor | Iterable[bytes]) -> Iterable[Any]:
        if not isinstance(tensor, Tensor):
            return tensor
        expected, actual = self._specs[name], TensorSpec.of(tensor)
        if actual != expected:
            raise ValueError(f"{name} should be {expected}, got {actual}")
        return [tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data]

    def write_index(self) -> None:
        """Write the index from tensors to files, unless there is a single file."""
        if len(self._headers) == 1:
            return
        files = {name: location.path.name for name, location in sorted(self._locations.items())}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": files}
        write_json(self._folder / INDEX, index)


def _open_in_place(path: str, flags: int) -> int:
    """Open a file for writing, and keep what it holds.

    Other machines may write their parts of it at the same time. A client of a network file system
    that may read the file, too, would read a whole page around a few bytes, and write it back over
    what another machine wrote meanwhile.
    """
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC))


def _packed(specs: Mapping[str, TensorSpec], limit: int) -> Iterator[list[str]]:
    """Split the names, in order, into lists of tensors with ``limit`` bytes at most."""
    shard: list[str] = []
    size = 0
    for name, spec in specs.items():
        if shard and size + spec.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += spec.num_bytes
    yield shard
