"""What ``import tnmoe.hf`` teaches transformers: to build, load and save converted models.

transformers has no public place for models whose modules a configuration changes, but for that of
quantization, which users need for itself. Five of its methods are therefore wrapped. They act on
configurations that have a :class:`Record`, and leave all others alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.families import all_ffns
from tnmoe.hf.files.folder import CONFIG
from tnmoe.hf.layers import (
    OF_EXPERTS,
    install_new,
    mixtures_of,
    mixtures_unnamed,
    networks_named,
)
from tnmoe.hf.record import ENTRY, configs_in, from_file, is_marked, record_of, to_file
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.hf.trust import as_trusted
from tnmoe.nn.moe import MPOMoE
from tnmoe.system.durable import write_atomically
from tnmoe.system.files import read_json

_SHOWN = 4


def teach_transformers() -> None:
    """Wrap the five methods, unless they are wrapped already."""
    for owner, name, wrapper in (
        (PreTrainedConfig, "_dict_from_json_file", _reading),
        (PreTrainedConfig, "to_json_file", _writing),
        (PreTrainedModel, "post_init", _building),
        (PreTrainedModel, "from_pretrained", _loading),
        (PreTrainedModel, "save_pretrained", _saving),
    ):
        method = vars(owner)[name]
        is_class_method = isinstance(method, classmethod)
        function: Callable = method.__func__ if is_class_method else method
        if not getattr(function, "_of_tnmoe", False):
            wrapped: Any = wraps(function)(wrapper(function))
            wrapped._of_tnmoe = True
            setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)


def _reading(read: Callable) -> Callable:
    def _dict_from_json_file(cls: Any, json_file: str | os.PathLike) -> Any:
        entries = read(cls, json_file)
        if not isinstance(entries, dict):
            return entries
        return from_file(as_trusted(entries))

    return _dict_from_json_file


def _writing(write: Callable) -> Callable:
    def to_json_file(
        self: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True
    ) -> None:
        if not is_marked(self):
            return write(self, json_file_path, use_diff)
        entries = to_file(json.loads(self.to_json_string(use_diff)))
        text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
        write_atomically(Path(json_file_path), text.encode())

    return to_json_file


def _building(post_init: Callable) -> Callable:
    def build(self: PreTrainedModel) -> None:
        post_init(self)
        record = record_of(self.config)
        if record is not None:
            install_new(self, record.config, record.networks)
        # A model around converted ones adds the losses of their routers to its own.
        of_parts = [found for each in configs_in(self.config) if (found := record_of(each))]
        if of_parts and mixtures_of(self):
            settings = (record or of_parts[0]).config
            if record or all(each.config == settings for each in of_parts):
                attach_router_losses(self, settings)

    return build


def _loading(load: Callable) -> Callable:
    def from_pretrained(
        cls: type[PreTrainedModel],
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        folder = pretrained_model_name_or_path
        entries = _local_entries(folder, kwargs.get("subfolder", ""))
        _check_given_config(folder, entries, kwargs.get("config"))
        model, info = load(cls, folder, *args, output_loading_info=True, **kwargs)
        _check_all_there(model, info, "state_dict" if folder is None else folder)
        _redraw(model, {name for name, *_ in info["mismatched_keys"]})
        return (model, info) if output_loading_info else model

    return from_pretrained


def _local_entries(folder: Any, subfolder: str) -> dict[str, Any]:
    """What config.json says, where there is one on this machine that can be read."""
    path = Path("" if folder is None else folder) / subfolder / CONFIG
    try:
        return {} if folder is None or not path.is_file() else read_json(path)
    except InputError:
        return {}  # transformers has its own message


def _check_given_config(folder: Any, entries: Mapping[str, Any], given: Any) -> None:
    """Refuse to load a converted model by the configuration of a dense one."""
    is_dense = isinstance(given, PreTrainedConfig) and not is_marked(given)
    if is_dense and ENTRY in entries:
        raise InputError(
            f"{folder} is of a converted model, but the {type(given).__name__} that was given as "
            "config is not: load it from there, or leave config out"
        )


def _check_all_there(model: PreTrainedModel, info: Mapping[str, Any], folder: Any) -> None:
    """Raise an InputError if a network has numbers that are not in the checkpoint."""
    paths = tuple(f"{path}." for path in mixtures_of(model))
    lost = {name for name in info["missing_keys"] if name.startswith(paths)}
    if any(OF_EXPERTS.search(name) for name in info["unexpected_keys"]):
        # The networks that these belong to are dense here.
        dense = {id(each) for ffn in all_ffns(model) for each in ffn.parameters}
        own = {name for name, each in model.named_parameters() if id(each) in dense}
        lost |= own & set(info["missing_keys"])
    lost -= {name for name, *_ in info["mismatched_keys"]}
    if lost:
        raise InputError(
            f"{folder} lacks {len(lost)} tensors of the feed-forward networks that its {CONFIG} "
            f"describes for {type(model).__name__}: {', '.join(sorted(lost)[:_SHOWN])}"
        )


@torch.no_grad()
def _redraw(model: PreTrainedModel, names: set[str]) -> None:
    """Draw the tensors of mixtures whose stored ones have other sizes, which the caller allowed."""
    for path, layer in mixtures_of(model).items() if names else ():
        new = {name for name in layer.state_dict() if f"{path}.{name}" in names}
        if new:
            _draw(layer, new)


def _draw(layer: MPOMoE, names: set[str]) -> None:
    kept = {name: each.clone() for name, each in layer.state_dict().items() if name not in names}
    for module in layer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    layer.load_state_dict(kept, strict=False)


def _saving(save: Callable) -> Callable:
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        _check_recorded(self)
        return save(self, *args, **kwargs)

    return save_pretrained


def _check_recorded(model: PreTrainedModel) -> None:
    """Refuse to write a folder whose configuration tells of other networks than the model has."""
    record = record_of(model.config)
    told = {id(each) for each in configs_in(model.config)} - {id(model.config)}
    recorded: list[str] = []
    for path, part in model.named_modules() if record is None else ():
        own = getattr(part, "config", None)
        if id(own) in told or path.startswith(tuple(recorded)):
            recorded.append(f"{path}.")  # with all that is in it, whatever configuration that holds
        elif record_of(own) is not None and mixtures_of(part):
            raise InputError(
                f"{path}, a {type(part).__name__}, was converted by itself, and the configuration "
                f"of the {type(model).__name__} around it does not say so: save {path} alone, or "
                f"convert the whole model with layers={path!r}"
            )
    if record is not None and (dense := networks_named(model, record.networks)):
        raise InputError(
            f"the configuration of this {type(model).__name__} says that {dense[0].name} is a "
            "mixture of experts, but it is a dense network: save what hf.average_experts makes of "
            "a converted model"
        )
    if record is not None and (unnamed := mixtures_unnamed(model, record.networks)):
        raise InputError(
            f"{unnamed[0]} of this {type(model).__name__} is a mixture of experts, but its "
            "configuration does not say so, and the saved folder would not load: name all layers "
            "that have one in config.tnmoe['networks']"
        )
