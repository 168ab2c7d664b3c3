"""Mixtures of experts in the place of dense networks: what both building and loading need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import FFN, find_ffns, weight_of
from tnmoe.nn.experts import DenseExperts, Experts, MPOExperts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.router import Router


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
            "shared": config.shared,
            "matrices": config.matrices,
        }
    return settings


def empty_moe(ffn: FFN, config: MPOEConfig) -> MPOMoE:
    """The layer that replaces ``ffn``, on the meta device: shapes and dtypes, no numbers."""
    inner, hidden = weight_of(ffn.up).shape
    make: type[Experts] = DenseExperts if config.layout == "dense" else MPOExperts
    experts = make(
        hidden_size=hidden,
        intermediate_size=inner,
        gated=ffn.gate is not None,
        bias="shared" if config.shared_bias else True,
        device="meta",
        dtype=weight_of(ffn.up).dtype,
        **expert_settings(ffn, config),
    )  # type: ignore[call-arg]
    for name, matrix in ffn.matrices.items():
        if matrix.bias is None:
            getattr(experts, name).bias = None
    return MPOMoE(new_router(ffn, config), experts, dropout=ffn.output_dropout)


def install_empty(model: nn.Module, config: MPOEConfig) -> None:
    """Put empty mixtures of experts in the place of a dense model's networks."""
    for ffn in find_ffns(model, config.layers, config.every):
        ffn.install(empty_moe(ffn, config))


def mixtures_of(model: nn.Module) -> dict[str, MPOMoE]:
    """The mixtures of experts of a model by where they are."""
    return {path: each for path, each in model.named_modules() if isinstance(each, MPOMoE)}
