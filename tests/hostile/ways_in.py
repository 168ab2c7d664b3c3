"""Every way in for files that others wrote, and what may come out of it."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

import tnmoe as tn
from tnmoe import cli, hf
from tnmoe.contraction.rates import _RATES, get_rates

# What a user may be told in one line.
_LONGEST = 2000


class WrongError(Exception):
    """What came out is neither right nor an error of one line."""


def check_line(text: str) -> None:
    """Raise a WrongError unless this is a line that a user can read."""
    lines = text.rstrip("\n").splitlines()
    if len(lines) != 1 or not lines[0].strip() or len(text) > _LONGEST:
        raise WrongError(f"{len(lines)} lines, {len(text)} characters: {text[-1500:]}")


def check_told(text: str) -> None:
    """Raise a WrongError unless the command line refuses in one line, after warnings of one."""
    lines = text.splitlines()
    warnings = [each for each in lines if each.startswith("tnmoe: warning: ")]
    check_line("\n".join(each for each in lines if each not in warnings))


def command(*arguments: object) -> Callable[[Path, Path], str]:
    """The command line; words in capitals stand for places.

    SPOILT is what was spoilt, DENSE and CONVERTED are sound folders, TARGET is none yet; of TARGET,
    SPOILT may be the unfinished work.
    """

    def way(spoilt: Path, sound: Path) -> str:
        target = spoilt.with_name(f"{spoilt.name}-made")
        if spoilt.suffix == ".partial":
            target = spoilt.with_suffix("")
        places = {
            "SPOILT": spoilt, "SPOILT/config.json": spoilt / "config.json", "TARGET": target,
            "DENSE": sound / "dense-llama", "CONVERTED": sound / "converted-llama",
        }  # fmt: skip
        code = cli.main([str(places.get(str(each), each)) for each in arguments])
        try:
            if code == 0:
                if target.exists():
                    _check_made(target)
                return "done"
            return f"status {code}"
        finally:
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(f"{target}.partial", ignore_errors=True)

    way.__name__ = " ".join(map(str, arguments))
    return way


def loaded(folder: Path, sound: Path) -> str:
    """A converted model by ``hf.from_pretrained``."""
    try:
        with redirect_stderr(StringIO()):  # what transformers thinks of it
            model = hf.from_pretrained(folder)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    _check_model(model, folder)
    return "done"


def operator(path: Path, sound: Path) -> str:
    """An operator by ``tn.load``."""
    try:
        found = tn.load(path)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    cores = found.cores if isinstance(found, tn.MPO) else (*found.aux, found.center)
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


def rates(path: Path, sound: Path) -> str:
    """Stored rates, which are those of a typical machine where the file is of no use."""
    with (
        mock.patch("tnmoe.contraction.rates.rates_path", return_value=path),
        mock.patch.dict(_RATES),
    ):
        _RATES.clear()
        found = get_rates("cpu")
    if not found.product(8, 8, 8, itemsize=4) > 0:
        raise WrongError(f"{found}")
    return "done"


_SETTINGS = ("--experts", 2, "--sites", 3)
_TO_DENSE = ("--to", "dense", "--jobs", 1)

# By the kind of what is spoilt.
WAYS: dict[str, tuple[Callable[[Path, Path], str], ...]] = {
    "dense": (
        command("inspect", "SPOILT", *_SETTINGS, "--jobs", 1),
        command("inspect", "SPOILT/config.json", *_SETTINGS),
        command("upcycle", "SPOILT", "TARGET", *_SETTINGS, "--dry-run"),
        command("upcycle", "SPOILT", "TARGET", *_SETTINGS, "--jobs", 1),
    ),
    "converted": (
        command("export", "SPOILT", "TARGET", "--dry-run"),
        command("export", "SPOILT", "TARGET", *_TO_DENSE, "--dry-run"),
        command("export", "SPOILT", "TARGET", *_TO_DENSE),
        loaded,
        loaded,
    ),
    "made": (
        command("export", "CONVERTED", "SPOILT", *_TO_DENSE),
        command("export", "CONVERTED", "SPOILT", *_TO_DENSE, "--overwrite"),
    ),
    "begun": (
        command("export", "CONVERTED", "TARGET", *_TO_DENSE),
        command("export", "CONVERTED", "TARGET", *_TO_DENSE, "--overwrite"),
    ),
    "config": (
        command("upcycle", "DENSE", "TARGET", "--config", "SPOILT", "--jobs", 1),
        command("inspect", "DENSE", "--config", "SPOILT", "--no-weights"),
    ),
    "operator": (operator, operator),
    "rates": (rates,),
}
