"""Empty mixtures of experts in the place of dense networks: what a checkpoint is loaded into."""

from __future__ import annotations

import torch
from torch import nn

from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import FFN, find_ffns
from tnmoe.nn.experts import DenseExperts, Experts, MPOExperts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.router import TopKRouter


def make_router(
    ffn: FFN, config: MPOEConfig, *, device: torch.device | str, dtype: torch.dtype
) -> TopKRouter:
    """A new router for the experts that replace ``ffn``."""
    return TopKRouter(
        ffn.up.in_features,
        config.num_experts,
        config.num_experts_per_tok,
        normalize=config.normalize_router,
        jitter_noise=config.jitter_noise,
        device=device,
        dtype=dtype,
    )


def empty_moe(ffn: FFN, config: MPOEConfig) -> MPOMoE:
    """The layer that replaces ``ffn``, on the meta device: shapes and dtypes, no numbers."""
    dtype = ffn.up.weight.dtype
    hidden, inner, gated = ffn.up.in_features, ffn.up.out_features, ffn.gate is not None
    experts: Experts
    if config.layout == "dense":
        experts = DenseExperts(
            config.num_experts, hidden, inner, ffn.activation, gated, bias=True,
            device="meta", dtype=dtype,
        )  # fmt: skip
    else:
        experts = MPOExperts(
            config.num_experts, hidden, inner, ffn.activation, gated, bias=True,
            up_shape=config.shape_for(inner, hidden),
            down_shape=config.shape_for(hidden, inner),
            max_bond=config.max_bond,
            device="meta", dtype=dtype,
        )  # fmt: skip
    for projection, linear in (
        (experts.up, ffn.up),
        (experts.down, ffn.down),
        (experts.gate, ffn.gate),
    ):
        if projection is not None and linear is not None and linear.bias is None:
            projection.bias = None
    return MPOMoE(make_router(ffn, config, device="meta", dtype=dtype), experts)


def install_empty(model: nn.Module, config: MPOEConfig) -> None:
    """Put empty mixtures of experts in the place of a dense model's networks."""
    for ffn in find_ffns(model, config.layers):
        ffn.install(empty_moe(ffn, config))
