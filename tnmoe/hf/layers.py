"""The mixture that replaces a dense network: with random numbers, or with the network's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.ffn import FFN, FusedHalf, size_of, weight_of
from tnmoe.hf.find import ffns_named
from tnmoe.hf.linear_layers import install_tensorized
from tnmoe.hf.ordinary import ordinary_named
from tnmoe.hf.record import Record
from tnmoe.nn.dense_experts import DenseExperts
from tnmoe.nn.experts import Experts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.routing.router import Router
from tnmoe.nn.settings import MPOSettings, mpo_settings
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.truncation.info import TruncationInfo


def new_mixture(ffn: FFN, config: MPOEConfig, device: torch.device | str | None = None) -> MPOMoE:
    """Make the mixture that replaces a network, with numbers drawn at random.

    Parameters
    ----------
    ffn : FFN
    config : MPOEConfig
    device : optional
        By default the network's. On the meta device nothing is drawn.
    """
    device = weight_of(ffn.up).device if device is None else device
    experts = _new_experts(ffn, config, device)
    return MPOMoE(_new_router(ffn, config, device), experts, dropout=ffn.output_dropout)


def _new_experts(ffn: FFN, config: MPOEConfig, device: torch.device | str) -> Experts:
    inner, hidden = weight_of(ffn.up).shape
    experts: Experts = _experts_class(config)(
        hidden_size=hidden,
        intermediate_size=inner,
        gated=ffn.gate is not None,
        bias="common" if config.common_bias else True,
        device=device,
        dtype=weight_of(ffn.up).dtype,
        **_expert_settings(ffn, config),
    )
    kept = _kept_modules(ffn, config)
    for name, matrix in ffn.matrices.items():
        projection = getattr(experts, name)
        if name in kept:
            projection.base = matrix
        if matrix.bias is None or (name in kept and config.common_bias):
            projection.bias = None
    return experts


def mpo_settings_of(ffn: FFN, config: MPOEConfig) -> dict[str, MPOSettings]:
    """Return the settings of those matrices of a network that become MPOs, by name."""
    if config.layout == "dense":
        return {}
    sizes = {name: size_of(matrix) for name, matrix in ffn.matrices.items()}
    return mpo_settings(sizes, **_layout_settings(ffn, config))


def _kept_modules(ffn: FFN, config: MPOEConfig) -> set[str]:
    """Return the names of matrices whose modules experts share as they stand."""
    settings = mpo_settings_of(ffn, config)
    return {
        name
        for name, matrix in ffn.matrices.items()
        if name in settings and settings[name].keeps_matrix and not isinstance(matrix, FusedHalf)
    }


def converted_mixture(
    ffn: FFN,
    config: MPOEConfig,
    router: Router,
    noise_seed: int,
    on_matrix: Callable[[str, TruncationInfo], None] | None = None,
) -> MPOMoE:
    """Make the mixture that replaces a network and computes the same.

    Parameters
    ----------
    ffn : FFN
    config : MPOEConfig
    router, noise_seed
        As :func:`draw_start` returns them.
    on_matrix : callable, optional
        As for :func:`upcycle`.
    """
    dense: dict[str, Any] = {}
    kept = _kept_modules(ffn, config)
    for name, matrix in ffn.matrices.items():
        if name in kept:
            dense[name] = matrix
        else:
            dense |= {name: weight_of(matrix), f"{name}_bias": matrix.bias}
    settings = _expert_settings(ffn, config)
    if config.layout != "dense":
        report = on_matrix and (lambda name, info: on_matrix(f"{ffn.name}.{name}", info))
        settings |= {"gauge": config.gauge, "on_matrix": report}
    experts = _experts_class(config).from_dense(
        **dense,
        **settings,
        common_bias=config.common_bias,
        noise=config.expert_noise,
        rng=np.random.default_rng(noise_seed),
    )
    return MPOMoE(router, experts, dropout=ffn.output_dropout)


def draw_start(
    ffn: FFN, config: MPOEConfig, device: torch.device | str | None = None
) -> tuple[Router, int]:
    """Draw what is random in a converted mixture, from torch's global generator.

    Parameters
    ----------
    ffn : FFN
    config : MPOEConfig
    device : optional
        Of the router; by default the network's.

    Returns
    -------
    router : Router
    noise_seed : int
        Seed of the noise on the experts.
    """
    noise_seed = int(torch.randint(2**62, (), device="cpu"))
    return _new_router(ffn, config, device), noise_seed


def install_new_mixtures(model: nn.Module, config: MPOEConfig, names: Iterable[str]) -> None:
    """Replace the networks of layers with these names by new mixtures."""
    for ffn in ffns_named(model, names):
        ffn.install(new_mixture(ffn, config).train(model.training))


def install_recorded(model: nn.Module, record: Record) -> None:
    """Replace networks, experts of mixtures and linear layers that a record names by new ones."""
    if record.config is not None:
        install_new_mixtures(model, record.config, record.networks)
    if record.compression is not None:
        _install_compressed(model, record.compression.experts)
    install_tensorized(model, record.linear)


def _install_compressed(
    model: nn.Module, structures: Mapping[str, Mapping[str, ProjectionStructure]]
) -> None:
    for name, experts in ordinary_named(model, structures):
        like = next(experts.module.parameters())
        new = experts.format.experts_class.from_structures(
            structures[name],
            len(experts.matrices["up"]),
            **experts.settings(),
            device=like.device,
            dtype=like.dtype,
        )
        experts.install(new.train(experts.module.training))


def _experts_class(config: MPOEConfig) -> Any:
    return DenseExperts if config.layout == "dense" else MPOExperts


def _expert_settings(ffn: FFN, config: MPOEConfig) -> dict[str, Any]:
    """Return the arguments that new experts and converted ones have in common."""
    settings: dict[str, Any] = {
        "num_experts": config.num_experts,
        "activation": ffn.activation,
        "dropout": ffn.dropout,
    }
    return settings if config.layout == "dense" else settings | _layout_settings(ffn, config)


def _layout_settings(ffn: FFN, config: MPOEConfig) -> dict[str, Any]:
    """Return the arguments that say which matrices are MPOs, of which shapes and bonds."""
    return {
        "layout": config.layout,
        "sites": config.sites,
        "group_size": config.group_size,
        "bond_ratio": config.bond_ratio,
        "up_shape": config.shapes.get(size_of(ffn.up)),
        "down_shape": config.shapes.get(size_of(ffn.down)),
        "max_bond": config.max_bond,
        "shared_sites": config.shared_sites,
        "matrices": config.matrices,
    }


def _new_router(ffn: FFN, config: MPOEConfig, device: torch.device | str | None) -> Router:
    weight = weight_of(ffn.up)
    device = weight.device if device is None else device
    return config.make_router(weight.shape[1], device=device, dtype=weight.dtype)
