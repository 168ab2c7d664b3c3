"""Loading a converted model as the class that it was saved from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.checks import check_all_described
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.folder import (
    ADAPTERS,
    CONFIG,
    INDEX,
    SINGLE,
    check_folder,
    check_inside,
    distributed_shards,
    inside,
)
from tnmoe.hf.find import mixtures_in
from tnmoe.hf.guards import NO_LIMITS, SizeLimits, guard_transformers
from tnmoe.hf.meta import config_from_entries, saved_class
from tnmoe.hf.record import decode_entries, record_in_entries, record_of
from tnmoe.hf.trust import no_foreign_code
from tnmoe.system.files import read_json

# Arguments of transformers: return what was loaded, and draw tensors of other sizes anew.
_INFO, _OTHER_SIZES = "output_loading_info", "ignore_mismatched_sizes"


def from_pretrained(folder: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load an MPOE checkpoint as the class it was saved from.

    Once ``tnmoe.hf`` is imported, ``AutoModelFor….from_pretrained`` loads it as well.

    Parameters
    ----------
    folder : path
        A folder that ``model.save_pretrained`` wrote.
    **kwargs
        Arguments of that class's ``from_pretrained``: ``dtype``, ``device_map``, ``config``,
        ``subfolder`` and so on.

    Returns
    -------
    PreTrainedModel
        With ``output_loading_info=True`` a tuple of the model and transformers' loading info.

    Raises
    ------
    InputError
        If there is no such folder, it holds no converted model of a format that this version
        reads, its files are damaged or lie outside of it, or its config.json describes other
        experts than its files hold.

    Notes
    -----
    Code that a folder holds or names does not run, unless you pass ``trust_remote_code=True``.
    Pickled weights are not read, unless you pass ``use_safetensors=False``. Links are followed
    within the folder, and from a snapshot of the Hugging Face cache to its files.

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
    subfolder, trusted = kwargs.pop("subfolder", ""), kwargs.get("trust_remote_code")
    where = inside(Path(folder), subfolder) if subfolder else Path(folder)
    config = _configuration(where, kwargs.get("config"))
    model_class = saved_class(config)
    if model_class is None:
        raise InputError(f"{os.fspath(folder)} does not say which class it was saved from")
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    limits = _check_files(where, model_class, kwargs)
    with_info, other_sizes = (kwargs.pop(name, False) for name in (_INFO, _OTHER_SIZES))
    kwargs = {"local_files_only": True, **kwargs, _INFO: True, _OTHER_SIZES: True}
    wrong = f"{where} cannot be loaded as {model_class.__name__}"
    with nullcontext() if trusted else no_foreign_code(), guard_transformers(wrong, limits):
        model, info = model_class.from_pretrained(os.fspath(where), **kwargs)
    if info["mismatched_keys"] and not other_sizes:
        name, stored, expected = min(info["mismatched_keys"])
        raise InputError(
            f"{name} is of shape {tuple(stored)} in {where}, its configuration says "
            f"{tuple(expected)}; {_OTHER_SIZES}=True draws it anew"
        )
    check_all_described(info["unexpected_keys"], mixtures_in(model), where)
    result: Any = (model, info) if with_info else model
    return result


def _check_files(folder: Path, model_class: Any, options: Mapping[str, Any]) -> SizeLimits:
    """Check the files that transformers will read by the rules of a :class:`Checkpoint`.

    Returns
    -------
    SizeLimits
        Limits for a model made from these files; :data:`NO_LIMITS` if the files set none.
    """
    check_inside(folder)
    has_whole = any((folder / name).exists() for name in (SINGLE, INDEX))
    has_ranks_only = bool(distributed_shards(folder)) and not has_whole
    if options["use_safetensors"] and not (options.get("gguf_file") or has_ranks_only):
        source = Checkpoint(folder, options.get("variant"))
        source.check_prefix(model_class.base_model_prefix)
        return SizeLimits.for_checkpoint(source)
    return NO_LIMITS


def _configuration(folder: Path, given: Any) -> PreTrainedConfig:
    """Return the configuration to load a folder with: its own, a given one, or a given path's."""
    if (folder / ADAPTERS).exists() and not (folder / CONFIG).exists():
        raise InputError(
            f"{folder} holds adapters of PEFT and no model: transformers' Auto classes load them "
            "with their model, or give PeftModel.from_pretrained the model first"
        )
    check_folder(folder)
    if isinstance(given, PreTrainedConfig):
        if record_of(given) is None:
            raise InputError(f"config, a {type(given).__name__}, is not of a converted model")
        return given
    path = folder if given is None else Path(given)
    path = inside(path, CONFIG) if path.is_dir() else path
    entries = decode_entries(read_json(path))
    record_in_entries(entries, path.parent)  # raises if there is no sound record
    return config_from_entries(entries)
