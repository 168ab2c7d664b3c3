"""Every entry point for files of unknown origin, with checks of its outcome."""

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

# Characters of the longest message of one line.
_LONGEST_LINE = 2000


class WrongError(Exception):
    """An outcome that is neither right nor an error of one line."""


def check_line(text: str) -> None:
    """Raise a WrongError unless this is a line that a user can read."""
    lines = text.rstrip("\n").splitlines()
    if len(lines) != 1 or not lines[0].strip() or len(text) > _LONGEST_LINE:
        raise WrongError(f"{len(lines)} lines, {len(text)} characters: {text[-1500:]}")


def check_refusal(text: str) -> None:
    """Raise a WrongError unless this is a line of refusal, after warnings of a line each."""
    lines = text.splitlines()
    warnings = [line for line in lines if line.startswith("tnmoe: warning: ")]
    check_line("\n".join(line for line in lines if line not in warnings))


def command(*arguments: object) -> Callable[[Path, Path], str]:
    """Return the command line as an entry point; words in capitals stand for paths.

    CORRUPTED is the corrupted file or folder, or an unfinished folder of TARGET. DENSE and
    CONVERTED are intact folders. TARGET does not exist yet.
    """

    def entry_point(corrupted: Path, intact: Path) -> str:
        target = corrupted.with_name(f"{corrupted.name}-made")
        if corrupted.suffix == ".partial":
            target = corrupted.with_suffix("")
        places = {
            "CORRUPTED": corrupted, "CORRUPTED/config.json": corrupted / "config.json",
            "TARGET": target, "DENSE": intact / "dense-llama",
            "CONVERTED": intact / "converted-llama",
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

    entry_point.__name__ = " ".join(map(str, arguments))
    return entry_point


def load_model(folder: Path, intact: Path) -> str:
    """Load a converted model by ``hf.from_pretrained``."""
    try:
        with redirect_stderr(StringIO()):  # warnings of transformers
            model = hf.from_pretrained(folder)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    _check_model(model, folder)
    return "done"


def load_operator(path: Path, intact: Path) -> str:
    """Load an operator by ``tn.load``."""
    try:
        found = tn.load(path)
    except (tn.InputError, OSError) as error:
        check_line(str(error))
        return "refused"
    with np.errstate(all="ignore"):
        dense = np.asarray(found)
    if dense.shape[-2:] != (found.shape.out_features, found.shape.in_features) or not found.cores:
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
            raise WrongError(f"random numbers: {sorted(lost)[:3]}")
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
    """Raise a WrongError unless a made folder has a configuration and intact files."""
    json.loads((target / "config.json").read_text())
    if not sum(len(load_file(path)) for path in target.glob("*.safetensors")):
        raise WrongError(f"nothing in {os.listdir(target)}")


def read_rates(path: Path, intact: Path) -> str:
    """Read stored rates; a typical machine's rates replace a useless file."""
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

# By the kind of the corrupted file or folder.
ENTRY_POINTS: dict[str, tuple[Callable[[Path, Path], str], ...]] = {
    "dense": (
        command("inspect", "CORRUPTED", *_SETTINGS, "--jobs", 1),
        command("inspect", "CORRUPTED/config.json", *_SETTINGS),
        command("upcycle", "CORRUPTED", "TARGET", *_SETTINGS, "--dry-run"),
        command("upcycle", "CORRUPTED", "TARGET", *_SETTINGS, "--jobs", 1),
    ),
    "converted": (
        command("export", "CORRUPTED", "TARGET", "--dry-run"),
        command("export", "CORRUPTED", "TARGET", *_TO_DENSE, "--dry-run"),
        command("export", "CORRUPTED", "TARGET", *_TO_DENSE),
        load_model,
        load_model,
    ),
    "made": (
        command("export", "CONVERTED", "CORRUPTED", *_TO_DENSE),
        command("export", "CONVERTED", "CORRUPTED", *_TO_DENSE, "--overwrite"),
    ),
    "begun": (
        command("export", "CONVERTED", "TARGET", *_TO_DENSE),
        command("export", "CONVERTED", "TARGET", *_TO_DENSE, "--overwrite"),
    ),
    "config": (
        command("upcycle", "DENSE", "TARGET", "--config", "CORRUPTED", "--jobs", 1),
        command("inspect", "DENSE", "--config", "CORRUPTED", "--no-weights"),
    ),
    "operator": (load_operator, load_operator),
    "rates": (read_rates,),
}
