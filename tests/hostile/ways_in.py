"""Every way in for files that others wrote, and what may come out of it."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file

import tnmoe as tn
from tnmoe import cli, hf

# What a user may be told in one line.
_LONGEST = 2000


class WrongError(Exception):
    """What came out is neither right nor an error of one line."""


def check_line(text: str) -> None:
    """Raise a WrongError unless this is a line that a user can read."""
    lines = text.rstrip("\n").splitlines()
    if len(lines) != 1 or not lines[0].strip() or len(text) > _LONGEST:
        raise WrongError(f"{len(lines)} lines, {len(text)} characters: {text[-1500:]}")


def command(*arguments: object) -> Callable[[Path, Random], str]:
    """The command line; ``SOURCE`` and ``TARGET`` stand for folders."""

    def way(folder: Path, rng: Random) -> str:
        target = folder.with_name(f"{folder.name}-made")
        places = {"SOURCE": folder, "CONFIG": folder / "config.json", "TARGET": target}
        code = cli.main([str(places.get(str(each), each)) for each in arguments])
        try:
            if code == 0:
                if target.exists():
                    _check_made(target)
                return "done"
            if code != 2:
                raise WrongError(f"exit status {code}")
            return "refused"
        finally:
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(f"{target}.partial", ignore_errors=True)

    way.__name__ = " ".join(map(str, arguments))
    return way


def loaded(folder: Path, rng: Random) -> str:
    """A converted model by ``hf.from_pretrained``."""
    try:
        with redirect_stderr(StringIO()):  # what transformers thinks of it
            model = hf.from_pretrained(folder)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    _check_model(model, folder)
    return "done"


def operator(path: Path, rng: Random) -> str:
    """An operator by ``tn.load``."""
    try:
        found = tn.load(path)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    cores = found.cores if isinstance(found, tn.MPO) else (*found.aux, found.center_core)
    with np.errstate(all="ignore"):
        dense = np.asarray(found)
    if dense.shape[-2:] != (found.shape.out_features, found.shape.in_features) or not cores:
        raise WrongError(f"a matrix of {dense.shape} for {found}")
    repr(found)
    return "done"


def _check_model(model: torch.nn.Module, folder: Path) -> None:
    """Raise a WrongError unless a model's numbers are those of its files."""
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for path, layer in model.named_modules():
        own = layer.state_dict() if isinstance(layer, tn.nn.MPOMoE) else {}
        if lost := {f"{path}.{name}" for name in own} - stored.keys():
            raise WrongError(f"numbers of nowhere: {sorted(lost)[:3]}")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise WrongError(f"{name} has no numbers")
        if name in stored and not _equal(tensor, stored[name].to(tensor.dtype)):
            raise WrongError(f"{name} has other numbers than its file")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(
        torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0)) if one.numel() else True
    )


def _check_made(target: Path) -> None:
    """Raise a WrongError unless a made folder has a configuration and sound files."""
    json.loads((target / "config.json").read_text())
    if not sum(len(load_file(path)) for path in target.glob("*.safetensors")):
        raise WrongError(f"nothing in {os.listdir(target)}")


OF_DENSE = (
    command("inspect", "SOURCE", "--experts", 2, "--sites", 3, "--jobs", 1),
    command("inspect", "CONFIG", "--experts", 2, "--sites", 3),
    command("upcycle", "SOURCE", "TARGET", "--experts", 2, "--sites", 3, "--dry-run"),
    command("upcycle", "SOURCE", "TARGET", "--experts", 2, "--sites", 3, "--jobs", 1),
)
OF_CONVERTED = (
    command("export", "SOURCE", "TARGET", "--dry-run"),
    command("export", "SOURCE", "TARGET", "--to", "dense", "--dry-run"),
    command("export", "SOURCE", "TARGET", "--to", "dense", "--jobs", 1),
    loaded,
    loaded,
)
