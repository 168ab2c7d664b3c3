"""Converted models loaded as the classes that they were saved from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError, shown
from tnmoe.files import read_json
from tnmoe.hf.entries import current_entries
from tnmoe.hf.record import ENTRY, Record, record_of
from tnmoe.hf.shards import CONFIG, check_folder
from tnmoe.hf.skeleton import architecture_of, config_from, foreign_values, model_class_named

# Where PEFT tells of adapters.
_ADAPTERS = "adapter_config.json"


def from_pretrained(folder: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load an MPOE checkpoint as the class it was saved from.

    With this module imported, ``AutoModelFor….from_pretrained`` loads it as well.

    Parameters
    ----------
    folder : path
        A folder that ``model.save_pretrained`` wrote.
    **kwargs
        For the ``from_pretrained`` of that class: ``dtype``, ``device_map``, ``config``,
        ``subfolder`` and so on.

    Raises
    ------
    InputError
        If there is no such folder, it holds no converted model of a format that this version
        reads, or tensors of its experts are missing.

    Notes
    -----
    Code that a folder holds is never run. Pickled weights are not read, unless
    ``use_safetensors=False`` is passed.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import MPOEConfig, upcycle
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = tempfile.mkdtemp()
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> upcycle(model, MPOEConfig(num_experts=4, sites=3)).save_pretrained(folder)
    >>> type(from_pretrained(folder)).__name__
    'GPT2LMHeadModel'
    """
    config = _configuration(Path(folder) / kwargs.get("subfolder", ""), kwargs.get("config"))
    name = architecture_of(config)
    model_class = None if name is None else model_class_named(name)
    if model_class is None:
        raise InputError(f"{os.fspath(folder)} names no class of transformers: got {shown(name)}")
    with foreign_values(f"{os.fspath(folder)} cannot be loaded as {name}"):
        return model_class.from_pretrained(
            folder, **{"local_files_only": True, "use_safetensors": True, **kwargs}
        )


def _configuration(folder: Path, given: Any) -> PreTrainedConfig:
    """The configuration to load a folder by: its own, a given one, or that of a given path."""
    if (folder / _ADAPTERS).exists() and not (folder / CONFIG).exists():
        raise InputError(
            f"{folder} holds adapters of PEFT and no model: transformers' Auto classes load them "
            "with their model, or give PeftModel.from_pretrained the model first"
        )
    check_folder(folder)
    if isinstance(given, PreTrainedConfig):
        if record_of(given) is None:
            raise InputError(f"config, a {type(given).__name__}, is of no converted model")
        return given
    path = folder if given is None else Path(given)
    path = path / CONFIG if path.is_dir() else path
    entries = current_entries(read_json(path), path)
    if ENTRY not in entries:
        raise InputError(f"{path.parent} is not an MPOE checkpoint: its config.json has none")
    Record.from_dict(entries[ENTRY])
    return config_from(entries)
