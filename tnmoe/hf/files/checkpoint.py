"""The tensors of a Hugging Face folder, read one at a time.

A safetensors file begins with eight bytes that hold the length of its header. The header follows
as JSON, with the dtype, shape and place of every tensor. The numbers of all tensors follow it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.hf.files.folder import CONFIG, WEIGHTS_ENTRY, inside, read_config, weights_file
from tnmoe.hf.files.tensors import TensorLocation, TensorSpec, total_bytes, total_params
from tnmoe.system.changes import file_states, first_changed
from tnmoe.system.files import read_json, read_safetensors_header
from tnmoe.system.memory import explain_memory_error
from tnmoe.system.tables import listed

# Bytes that are read at a time when a tensor is copied.
_CHUNK_BYTES = 16 * 2**20


class Checkpoint:
    """The tensors of a folder with config.json and safetensors files.

    The constructor reads the headers of the files. :meth:`load` reads the numbers of a tensor.

    Parameters
    ----------
    folder : Path
    variant : str, optional
        Variant of the weights, as in transformers: ``fp16`` for ``model.fp16.safetensors``.

    Attributes
    ----------
    config : dict
        Contents of config.json, without the entry that names the file of weights.
    specs : dict from str to TensorSpec
        Every tensor by name, in the order of the files.
    locations : dict from str to TensorLocation

    Raises
    ------
    InputError
        If the folder has no config.json, a file is missing, damaged or outside the folder, or a
        tensor is not in the file that the index names. Pickled weights are never read.
    """

    def __init__(self, folder: str | os.PathLike, variant: str | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._states = file_states([self.folder / CONFIG])
        self.config = read_config(self.folder)
        weights = weights_file(self.folder, self.config.pop(WEIGHTS_ENTRY, None), variant)
        self._states |= file_states([weights])
        index = _read_index(weights) if weights.suffix == ".json" else {}
        self.specs: dict[str, TensorSpec] = {}
        self.locations: dict[str, TensorLocation] = {}
        for path in [inside(self.folder, file) for file in sorted(set(index.values()))] or [
            weights
        ]:
            self._add_file(path)
        self._check_index(index, weights)

    def _add_file(self, path: Path) -> None:
        """Add the tensors of a file."""
        self._states |= file_states([path])
        for name, spec, offset in _read_header(path):
            if name in self.specs:
                raise InputError(f"{path} and {self.locations[name].path} both hold {name}")
            self.specs[name], self.locations[name] = spec, TensorLocation(path, offset)

    def _check_index(self, index: Mapping[str, str], weights: Path) -> None:
        """Raise an InputError unless the files hold all tensors of the index, each in its file."""
        if absent := set(index) - set(self.specs):
            raise InputError(
                f"{weights} lists {len(absent)} tensors that its files lack: {listed(absent)}"
            )
        for name, file in index.items():
            if self.locations[name].path != self.folder / file:
                raise InputError(f"{name} is not in {file}, where the index puts it")

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return total_bytes(self.specs.values())

    @property
    def num_params(self) -> int:
        """Number of elements of all tensors."""
        return total_params(self.specs.values())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Data that differ between two checkpoints, and change when a file does."""
        # Device and inode are left out: the same files may be mounted elsewhere later.
        files = [[path.name, list((self._states[path] or ())[2:])] for path in sorted(self._states)]
        return {"config": self.config, "files": files}

    def check_unchanged(self) -> None:
        """Raise an InputError if a file was written to, replaced or removed since it was read."""
        if path := first_changed(self._states):
            raise InputError(f"{path} has changed since it was first read")

    def check_prefix(self, prefix: str) -> None:
        """Raise an InputError if a tensor is there twice, with and without a prefix.

        Parameters
        ----------
        prefix : str
            ``base_model_prefix`` of a model class. transformers accepts names of tensors with and
            without it, and would take both for the same tensor.
        """
        for name in self.specs:
            if (twin := f"{prefix}.{name}") in self.specs:
                raise InputError(
                    f"{self.folder} holds both {name} and {twin}, which are one tensor"
                )

    def load(self, name: str) -> Tensor:
        """Read a tensor into the CPU's memory.

        Raises
        ------
        InputError
            If the file has become shorter.
        """
        spec, location = self.specs[name], self.locations[name]
        data = bytearray(spec.num_bytes)
        with open(location.path, "rb") as file:
            file.seek(location.offset)
            if file.readinto(data) < spec.num_bytes:
                raise InputError(f"{location.path} ends within {name}")
        if not data:
            return torch.empty(spec.shape, dtype=spec.torch_dtype)
        return torch.frombuffer(data, dtype=spec.torch_dtype).reshape(spec.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read the bytes of a tensor, some megabytes at a time.

        Raises
        ------
        InputError
            If the file has become shorter.
        """
        location, bytes_left = self.locations[name], self.specs[name].num_bytes
        with open(location.path, "rb") as file:
            file.seek(location.offset)
            while bytes_left:
                data = file.read(min(bytes_left, _CHUNK_BYTES))
                if not data:
                    raise InputError(f"{location.path} ends within {name}")
                bytes_left -= len(data)
                yield data


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of every tensor, by the name of the tensor."""
    index = read_json(path).get("weight_map")
    is_sound = isinstance(index, dict) and all(isinstance(file, str) for file in index.values())
    if not index or not is_sound:
        raise InputError(f"{path} has no weight_map from tensors to files")
    return index


def _read_header(path: Path) -> Iterator[tuple[str, TensorSpec, int]]:
    """Yield the name, description and offset of each tensor, if safetensors accepts the file."""
    header, start = read_safetensors_header(path)
    try:
        purpose = f"reading the header of {path}"
        with explain_memory_error(purpose), safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            spec = TensorSpec(entry["dtype"], tuple(entry["shape"]), end - begin)
            yield name, spec, start + begin
