"""Hooks into transformers, so that its own classes build, load and save converted models.

transformers offers one public hook for models whose modules depend on their configuration: that of
quantization, which users need for itself. So five methods of transformers are wrapped. The wrappers
act on configurations that have a :class:`Record`, and leave all others alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.checks import EXPERT_TENSOR
from tnmoe.hf.files.folder import CONFIG
from tnmoe.hf.find import (
    all_ffns,
    ffns_named,
    mixtures_in,
    mixtures_not_named,
    possible_names,
)
from tnmoe.hf.layers import install_recorded
from tnmoe.hf.linear_layers import layers_named, linear_layers, tensorized_in
from tnmoe.hf.ordinary import compressed_in, ordinary_named
from tnmoe.hf.record import (
    ENTRY,
    Record,
    configs_in,
    decode_entries,
    encode_entries,
    has_record,
    record_of,
)
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.hf.trust import allowed_entries
from tnmoe.nn.experts import Experts
from tnmoe.nn.moe import MPOMoE
from tnmoe.system.durable import write_json
from tnmoe.system.files import read_json
from tnmoe.system.tables import listed

# Attribute that tells a wrapped method from transformers' own.
_WRAPPED = "_wrapped_by_tnmoe"


def wrap_transformers() -> None:
    """Wrap five methods of transformers, unless they are wrapped already."""
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
        if not getattr(function, _WRAPPED, False):
            wrapped: Any = wraps(function)(wrapper(function))
            setattr(wrapped, _WRAPPED, True)
            setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)


def _reading(read: Callable) -> Callable:
    """Wrap the reading of config.json: decode records, and hide foreign code if the caller must."""

    def _dict_from_json_file(cls: Any, json_file: str | os.PathLike) -> Any:
        entries = read(cls, json_file)
        if not isinstance(entries, dict):
            return entries
        return decode_entries(allowed_entries(entries))

    return _dict_from_json_file


def _writing(write: Callable) -> Callable:
    """Wrap the writing of config.json: encode records."""

    def to_json_file(
        self: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True
    ) -> None:
        if not has_record(self):
            return write(self, json_file_path, use_diff)
        entries = encode_entries(json.loads(self.to_json_string(use_diff)))
        write_json(Path(json_file_path), entries, sort_keys=True)

    return to_json_file


def _building(post_init: Callable) -> Callable:
    """Wrap the end of a model's constructor: put mixtures in, and attach their losses."""

    def build(self: PreTrainedModel) -> None:
        post_init(self)
        record = record_of(self.config)
        if record is not None:
            install_recorded(self, record)
            _leave_experts_whole(self)
        # A model around converted ones adds the losses of their routers to its own.
        records = [found for part in configs_in(self.config) if (found := record_of(part))]
        if records and mixtures_in(self):
            settings = (record or records[0]).config
            is_common = record or all(found.config == settings for found in records)
            if settings is not None and is_common:
                attach_router_losses(self, settings)

    return build


def _leave_experts_whole(model: PreTrainedModel) -> None:
    """Take converted experts out of the plans by which transformers divides models between ranks.

    The rules are made for the experts that were there before. Those that sum outputs over ranks
    would sum those of whole experts.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, MPOMoE | Experts)]
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths}
    for name in ("_tp_plan", "_ep_plan"):
        plan = getattr(model, name, None) or {}
        kept = {
            rule: style
            for rule, style in plan.items()
            if not any(rule == each or rule.startswith(f"{each}.") for each in patterns)
        }
        if len(kept) < len(plan):
            setattr(model, name, kept)


def _loading(load: Callable) -> Callable:
    """Wrap ``from_pretrained``: check that experts are complete; draw tensors of other sizes."""

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
        _check_complete(model, info, "state_dict" if folder is None else folder)
        _redraw(model, {name for name, *_ in info["mismatched_keys"]})
        return (model, info) if output_loading_info else model

    return from_pretrained


def _local_entries(folder: Any, subfolder: str) -> dict[str, Any]:
    """Return the entries of a config.json on this machine; none if it cannot be read."""
    path = Path("" if folder is None else folder) / subfolder / CONFIG
    try:
        return {} if folder is None or not path.is_file() else read_json(path)
    except InputError:
        return {}  # transformers raises its own error


def _check_given_config(folder: Any, entries: Mapping[str, Any], given: Any) -> None:
    """Refuse to load a converted model by the configuration of a dense one."""
    is_dense = isinstance(given, PreTrainedConfig) and not has_record(given)
    if is_dense and ENTRY in entries:
        raise InputError(
            f"{folder} holds a converted model, but the {type(given).__name__} given as config "
            "describes a dense one: read it from that folder, or leave config out"
        )


def _check_complete(model: PreTrainedModel, info: Mapping[str, Any], folder: Any) -> None:
    """Raise an InputError if the checkpoint lacks numbers of what is on record."""
    blocks = {path.rpartition(".")[0] for path in compressed_in(model)}
    linear = tuple(f"{path}." for path in tensorized_in(model))
    paths = (*(f"{path}." for path in (*mixtures_in(model), *blocks)), *linear)
    lost = {name for name in info["missing_keys"] if name.startswith(paths)}
    if any(EXPERT_TENSOR.search(name) for name in info["unexpected_keys"]):
        # The model has dense networks where the checkpoint has these experts.
        dense = {id(parameter) for ffn in all_ffns(model) for parameter in ffn.parameters}
        names = {name for name, each in model.named_parameters() if id(each) in dense}
        lost |= names & set(info["missing_keys"])
    lost -= {name for name, *_ in info["mismatched_keys"]}
    if lost:
        what = (
            "linear layers"
            if all(name.startswith(linear) for name in lost)
            else "feed-forward networks"
        )
        raise InputError(
            f"{folder} lacks {len(lost)} tensors of the {what} that its {CONFIG} "
            f"describes for {type(model).__name__}: {listed(lost)}"
        )


@torch.no_grad()
def _redraw(model: PreTrainedModel, names: set[str]) -> None:
    """Draw tensors of mixtures anew: the caller allowed that the stored ones have other sizes."""
    layers: dict[str, nn.Module] = {}
    if names:
        layers = {**mixtures_in(model), **compressed_in(model), **tensorized_in(model)}
    for path, layer in layers.items():
        new = {name for name in layer.state_dict() if f"{path}.{name}" in names}
        if new:
            _redraw_layer(layer, new)


def _redraw_layer(layer: nn.Module, names: set[str]) -> None:
    kept = {
        name: tensor.clone() for name, tensor in layer.state_dict().items() if name not in names
    }
    # A module comes after its parts, which it may draw in its own way.
    for module in reversed(list(layer.modules())):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    layer.load_state_dict(kept, strict=False)


def _saving(save: Callable) -> Callable:
    """Wrap ``save_pretrained``: check that the configuration describes the model."""

    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        _check_recorded(self)
        given = signature(save).bind(self, *args, **kwargs).arguments
        _check_whole(self, given.get("state_dict"))
        return save(self, *args, **kwargs)

    return save_pretrained


def _check_whole(model: PreTrainedModel, state: Mapping[str, Any] | None) -> None:
    """Refuse to save a model whose experts are spread over ranks: this one has only a part."""
    layers = [each for each in model.modules() if isinstance(each, Experts)]
    if all(layer.exchange is None for layer in layers):
        return
    tensors = dict(model.named_parameters()) if state is None else state
    if spread := [name for name, each in tensors.items() if hasattr(each, "full_tensor")]:
        raise InputError(
            f"{listed(spread)} are spread over ranks: call tnmoe.hf.save_spread on every rank"
        )


def _check_recorded(model: PreTrainedModel) -> None:
    """Refuse to save a model whose configuration records other networks than it has."""
    record = record_of(model.config)
    if record is None:
        _check_parts_recorded(model)
        return
    if dense := ffns_named(model, record.networks):
        raise InputError(
            f"the configuration of this {type(model).__name__} says that {dense[0].name} is a "
            "mixture of experts, but it is a dense network: save what hf.average_experts makes of "
            "a converted model"
        )
    if unnamed := mixtures_not_named(model, record.networks):
        raise InputError(
            f"{unnamed[0]} of this {type(model).__name__} is a mixture of experts, but its "
            "configuration does not say so, and the saved folder would not load: name all layers "
            "that have one in config.tnmoe['networks']"
        )
    _check_compression_recorded(model, record)
    _check_linear_recorded(model, record)


def _check_linear_recorded(model: PreTrainedModel, record: Record) -> None:
    """Refuse to save a model whose configuration records other linear layers than it has."""
    for name, _ in layers_named(linear_layers(model), record.linear, model):
        raise InputError(
            f"the configuration of this {type(model).__name__} says that {name} is an MPO, but it "
            "is a plain layer: save what hf.untensorize makes of the model"
        )
    names_of = possible_names(model)
    for path in tensorized_in(model):
        if names_of(path).isdisjoint(record.linear):
            raise InputError(
                f"{path} of this {type(model).__name__} is an MPO, but its configuration does not "
                "say so, and the saved folder would not load: put layers in by hf.tensorize"
            )


def _check_compression_recorded(model: PreTrainedModel, record: Record) -> None:
    """Refuse to save a model whose configuration records other compressed experts than it has."""
    recorded = {} if record.compression is None else record.compression.experts
    for name, _ in ordinary_named(model, recorded):
        raise InputError(
            f"the configuration of this {type(model).__name__} says that {name} are compressed "
            "experts, but they are ordinary ones: save what hf.to_moe makes of a compressed model"
        )
    names_of = possible_names(model)
    for path in compressed_in(model):
        if names_of(path).isdisjoint(recorded):
            raise InputError(
                f"{path} of this {type(model).__name__} shares cores, but its configuration does "
                "not say so, and the saved folder would not load: compress the model with "
                "hf.compress"
            )


def _check_parts_recorded(model: PreTrainedModel) -> None:
    """Refuse a converted model inside ``model`` whose configuration is not inside ``model``'s."""
    saved = {id(config) for config in configs_in(model.config)} - {id(model.config)}
    checked: list[str] = []
    for path, part in model.named_modules():
        config = getattr(part, "config", None)
        if id(config) in saved or path.startswith(tuple(checked)):
            # This also covers all modules inside the part, whatever configurations they have.
            checked.append(f"{path}.")
        elif record_of(config) is not None and any(
            find(part) for find in (mixtures_in, compressed_in, tensorized_in)
        ):
            raise InputError(
                f"{path}, a {type(part).__name__}, was converted by itself, and the configuration "
                f"of the {type(model).__name__} around it does not say so: save {path} alone, or "
                f"convert the whole model with layers={path!r}"
            )
