"""What a config.json says, also one that an older tnmoe wrote.

Those told of the conversion under ``quantization_config``, and of the layers by position.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from tnmoe.errors import InputError, shown
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import find_ffns
from tnmoe.hf.folders.checkpoint import OLD_PLACE, is_old
from tnmoe.hf.folders.skeleton import config_from, model_without_numbers
from tnmoe.hf.record import from_file, mark, with_records

_LAYOUT_VERSION = 1

# Parts of a regular expression that may repeat.
_REPEATED = re.compile(r"[*+{]|(?<!\()\?")


def current_entries(entries: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Entries of a config.json as transformers' configurations take them.

    Parameters
    ----------
    entries : mapping
        Of any config.json; what tnmoe has not written stays as it is.
    path : path
        Where they are from, for messages.

    Raises
    ------
    InputError
        If they are in the old form and damaged.
    """
    entries = from_file(entries)
    if not is_old(entries):
        return entries
    stored = entries[OLD_PLACE]
    if stored.get("layout_version", _LAYOUT_VERSION) != _LAYOUT_VERSION:
        raise InputError(f"{path} has layout version {stored['layout_version']}, which is unknown")
    told = stored.get("mpoe")
    if not isinstance(told, Mapping):
        raise InputError(f"{OLD_PLACE} of {path} must hold mpoe, an object, got {told!r}")
    config = MPOEConfig.from_dict(told)
    if isinstance(config.layers, str):
        _check_quick(config.layers, path)
    dense = {key: value for key, value in entries.items() if key != OLD_PLACE}
    model = model_without_numbers(config_from(dense))
    mark(model, config, [ffn.name for ffn in find_ffns(model, config.layers, config.every)])
    warnings.warn(
        f"{path} was written by an older tnmoe: load the model and call save_pretrained, since the "
        "next version will not read it",
        FutureWarning,
        stacklevel=2,
    )
    return with_records(dense, model.config)


def _check_quick(pattern: str, path: str | os.PathLike) -> None:
    """Refuse a regular expression from a file that might take for ever to look for.

    Two repetitions, and one group that does not repeat, take a cube of a name's length.
    """
    bare = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    repeated = list(_REPEATED.finditer(bare))
    groups = any(bare[each.start() - 1 : each.start()] == ")" for each in repeated)
    if len(repeated) > 2 or groups or bare.count("(") > 1 or len(bare) > 200:
        raise InputError(
            f"layers of {path} is a regular expression with more than two repetitions or one group,"
            f" which is not looked for, got {shown(pattern)}: write the positions of the networks"
        )
