"""Mixtures of experts in the place of dense networks: what both building and loading need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import FFN, all_ffns, weight_of
from tnmoe.nn.experts import DenseExperts, Experts
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.routing.router import Router


def new_router(ffn: FFN, config: MPOEConfig, device: torch.device | str | None = None) -> Router:
    """A router for the layer that replaces ``ffn``, on the device of its matrices by default."""
    weight = weight_of(ffn.up)
    device = weight.device if device is None else device
    return config.make_router(weight.shape[1], device=device, dtype=weight.dtype)


def expert_settings(ffn: FFN, config: MPOEConfig) -> dict[str, Any]:
    """What experts in the place of ``ffn`` are made with, besides their sizes and matrices."""
    settings: dict[str, Any] = {
        "num_experts": config.num_experts,
        "activation": ffn.activation,
        "dropout": ffn.dropout,
    }
    if config.layout != "dense":
        settings |= {
            "up_shape": config.shape_for(*weight_of(ffn.up).shape),
            "down_shape": config.shape_for(*weight_of(ffn.down).shape),
            "max_bond": config.max_bond,
            "shared_sites": config.shared_sites,
            "matrices": config.matrices,
        }
    return settings


def new_moe(ffn: FFN, config: MPOEConfig, device: torch.device | str | None = None) -> MPOMoE:
    """The layer that replaces ``ffn`` with numbers of its own, drawn at random.

    Parameters
    ----------
    ffn : FFN
    config : MPOEConfig
    device : optional
        That of the network by default; on the meta device there are no numbers.
    """
    device = weight_of(ffn.up).device if device is None else device
    inner, hidden = weight_of(ffn.up).shape
    make: type[Experts] = DenseExperts if config.layout == "dense" else MPOExperts
    experts = make(
        hidden_size=hidden,
        intermediate_size=inner,
        gated=ffn.gate is not None,
        bias="common" if config.common_bias else True,
        device=device,
        dtype=weight_of(ffn.up).dtype,
        **expert_settings(ffn, config),
    )  # type: ignore[call-arg]
    for name, matrix in ffn.matrices.items():
        if matrix.bias is None:
            getattr(experts, name).bias = None
    return MPOMoE(new_router(ffn, config, device), experts, dropout=ffn.output_dropout)


def networks_named(model: nn.Module, names: Iterable[str]) -> list[FFN]:
    """The dense networks of a model that have one of these names there.

    As for tensors of a checkpoint, the name may begin with the model's ``base_model_prefix`` or
    leave it out: ``encoder.layer.0`` of a BertModel is ``bert.encoder.layer.0`` of a
    BertForMaskedLM. It may also count from a module inside that has the model's configuration.
    """
    wanted, names_of = set(names), _naming(model)
    return [ffn for ffn in all_ffns(model) if not wanted.isdisjoint(names_of(ffn.name))]


def mixtures_unnamed(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Where a model has mixtures in layers that have none of these names, as networks have them."""
    wanted, names_of = set(names), _naming(model)

    def is_named(path: str) -> bool:
        parts = path.split(".")
        layers = (".".join(parts[:end]) for end in range(len(parts)))
        return any(not wanted.isdisjoint(names_of(layer)) for layer in layers)

    return [path for path in mixtures_of(model) if not is_named(path)]


def _naming(model: nn.Module) -> Callable[[str], set[str]]:
    """From a layer's name in a model to all names that a record may have for it."""
    config = getattr(model, "config", None)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    roots = {path for path, each in model.named_modules() if path and _has(each, config)}

    def names_of(name: str) -> set[str]:
        parts = name.split(".")
        inside = {
            ".".join(parts[end:]) for end in range(1, len(parts)) if ".".join(parts[:end]) in roots
        }
        return {name, prefix + name, name.removeprefix(prefix)} | inside

    return names_of


def _has(module: nn.Module, config: Any) -> bool:
    return config is not None and getattr(module, "config", None) is config


def install_new(model: nn.Module, config: MPOEConfig, names: Iterable[str]) -> None:
    """Put new mixtures of experts in the place of the networks that have these names."""
    for ffn in networks_named(model, names):
        ffn.install(new_moe(ffn, config).train(model.training))


# Tensors of experts are called so.
OF_EXPERTS = re.compile(r"\.experts\.(up|gate|down)\.")


def check_none_left(names: Iterable[str], paths: Iterable[str], folder: Any) -> None:
    """Raise an InputError if tensors that a model has no place for are of mixtures.

    Parameters
    ----------
    names : iterable of str
        Tensors of a folder that are not the model's.
    paths : iterable of str
        Where the model has mixtures.
    folder : path
        For the message.
    """
    names = list(names)
    others = {name[: found.start()] for name in names if (found := OF_EXPERTS.search(name))}
    inside = tuple(f"{path}." for path in {*paths, *others})
    if left := sorted(name for name in names if name.startswith(inside)):
        raise InputError(
            f"{folder} holds {len(left)} tensors of mixtures that its config.json does not "
            f"describe: {', '.join(left[:4])}"
        )


def check_model(model: object) -> None:
    """Raise a TypeError unless this is a model of transformers, by itself.

    In a wrapper, torch.compile's or PEFT's, networks have other names than in the model that is
    saved.
    """
    if not isinstance(model, PreTrainedModel):
        wraps = isinstance(model, nn.Module) and hasattr(model, "config")
        raise TypeError(
            f"model must be a model of transformers, got {type(model).__qualname__}"
            + (": give the model that it wraps" if wraps else "")
        )


def check_in_memory(model: nn.Module, planner: str) -> None:
    """Raise an InputError where a model's tensors are elsewhere: offloaded, or never loaded.

    ``planner`` is what does the same work from folder to folder.
    """
    absent = [name for name, each in model.named_parameters() if each.is_meta]
    if absent:
        raise InputError(
            f"{type(model).__name__} has {len(absent)} tensors that are not in memory, "
            f"{absent[0]} for one: load it without offloading, or use {planner}, which never "
            "holds a whole model"
        )


def mixtures_of(model: nn.Module) -> dict[str, MPOMoE]:
    """The mixtures of experts of a model by where they are."""
    return {path: each for path, each in model.named_modules() if isinstance(each, MPOMoE)}
