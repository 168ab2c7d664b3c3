"""A Hugging Face folder: the files that transformers reads, and a check that they lie inside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnmoe.errors import InputError
from tnmoe.system.files import check_json_size, read_json

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# PEFT describes adapters here.
ADAPTERS = "adapter_config.json"

# The entry of config.json that may name the file of weights, or the index of several.
WEIGHTS_ENTRY = "transformers_weights"

# Endings of files that transformers may read.
_READ = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")

# Small files that belong to a model beside its weights: tokenizers, generation settings, licences.
_COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")

# Bytes of the largest file that a conversion copies beside the weights.
_MAX_COMPANION_BYTES = 10**9


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a folder's config.json, or of a file of that kind."""
    if path.is_file():
        return read_json(path)
    check_folder(path)
    return read_json(inside(path, CONFIG))


def check_folder(folder: Path) -> None:
    """Raise an InputError unless this is a folder with a config.json."""
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a folder")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} is not a Hugging Face folder: no config.json there")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, after a check that the file does lie there.

    A link may lead to a file of the same folder. In a snapshot of the Hugging Face cache, it may
    also lead to the cache's blobs.

    Raises
    ------
    InputError
        If the file is missing or lies elsewhere.
    """
    path = folder / name
    if not os.path.exists(path):  # also False for a name that is too long for a file
        raise InputError(f"{path} is missing")
    real = folder.resolve()
    blobs = [
        parent.parent / "blobs"
        for parent in real.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    if not any(path.resolve().is_relative_to(allowed) for allowed in (real, *blobs)):
        raise InputError(
            f"{path} leads out of the folder: refused; put the file itself there (cp -rL copies a "
            "folder with what its links lead to)"
        )
    return path


def check_inside(folder: Path) -> None:
    """Raise an InputError if a file that transformers may read lies outside the folder.

    The same error reports a JSON file that is too large to read.
    """
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


def distributed_shards(folder: Path) -> list[Path]:
    """List the files of a distributed checkpoint, which transformers prefers to all others."""
    return sorted(folder.glob("shard-*-model-*-of-*.safetensors"))


def weights_file(folder: Path, named: Any, variant: str | None) -> Path:
    """Return the file of weights, or the index of several, that transformers would read.

    Parameters
    ----------
    folder : Path
    named : str, optional
        The file that config.json names.
    variant : str, optional
        ``fp16`` for ``model.fp16.safetensors``.

    Raises
    ------
    InputError
        If the folder has no such file. Pickles are never read, nor the share of a single process
        of a distributed checkpoint.
    """
    if shards := distributed_shards(folder):
        raise InputError(
            f"{shards[0]} holds the share of one process of several: save the whole model"
        )
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".index.json")):
            raise InputError(
                f"{folder / CONFIG} names no safetensors file as {WEIGHTS_ENTRY}: {named!r}"
            )
        return inside(folder, named)
    single, index = (_of_variant(name, variant) for name in (SINGLE, INDEX))
    for name in (single, index):
        if (folder / name).exists():
            return inside(folder, name)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
    hint = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
    raise InputError(f"{folder} has no {single} and no {index}{hint}")


def _of_variant(name: str, variant: str | None) -> str:
    base, _, ending = name.rpartition(".")
    return name if variant is None else f"{base}.{variant}.{ending}"


def companion_files(folder: Path) -> Iterator[Path]:
    """List the small files that a converted model takes along, tokenizers and licences.

    Raises
    ------
    InputError
        If such a file is huge or lies outside the folder.
    """
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        belongs = path.suffix in _COMPANIONS or path.stem.upper() in _LICENCES
        is_rewritten = path.name.endswith(".index.json") or path == folder / CONFIG
        if path.is_file() and belongs and not is_rewritten:
            if (size := path.stat().st_size) > _MAX_COMPANION_BYTES:
                raise InputError(
                    f"{path} would be copied, and has {size / 1e9:.3g} GB: move it away"
                )
            yield inside(folder, str(path.relative_to(folder)))
