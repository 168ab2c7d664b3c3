"""Mixtures whose experts use the matrices of a network that stays a part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.ffn import FFN
from tnmoe.nn.experts import Experts
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.layouts import new_delta
from tnmoe.nn.linear import device_of_linear, dtype_of_linear, size_of_linear
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.settings import MPOSettings, mpo_settings


def new_mixture_beside(
    ffn: FFN, matrices: Mapping[str, nn.Module], config: MPOEAdapterConfig
) -> MPOMoE:
    """Make a mixture that starts as a network, and uses its matrices where they stand.

    Parameters
    ----------
    ffn : FFN
    matrices : mapping from str to Module
        The network's linear modules, ``up`` or ``gate_up``, ``down`` and perhaps ``gate``.
    config : MPOEAdapterConfig
    """
    settings = settings_of(matrices, config)
    projections: Any = {
        name: _projection(module, config.num_experts, settings[name])
        for name, module in matrices.items()
    }
    experts = Experts(**projections, activation=ffn.activation, dropout=ffn.dropout)
    if isinstance(ffn.activation, nn.Module):
        # The activation stays where it is, too.
        _lend(experts, "activation", experts.activation)  # type: ignore[arg-type]
    like = next(projections["down"].parameters())
    router = config.to_moe_config().make_router(
        experts.hidden_size, device=like.device, dtype=like.dtype
    )
    return MPOMoE(router, experts, dropout=ffn.output_dropout)


def settings_of(
    matrices: Mapping[str, nn.Module], config: MPOEAdapterConfig
) -> dict[str, MPOSettings]:
    """Return how the experts' parts of a network's matrices become MPOs, by projection.

    Parameters
    ----------
    matrices, config
        As for :func:`new_mixture_beside`.

    Raises
    ------
    InputError
        If a matrix has no shape of the layout.
    """
    of_moe = config.to_moe_config()
    # One projection into both halves has the shape of ``up``.
    sizes = {
        "up" if name == "gate_up" else name: size_of_linear(module)
        for name, module in matrices.items()
    }
    found = mpo_settings(
        sizes,
        layout=config.layout,
        sites=of_moe.sites,
        group_size=of_moe.group_size,
        bond_ratio=1.0,
        up_shape=None,
        down_shape=None,
        max_bond=of_moe.max_bond,
        shared_sites=None,
        matrices=sizes,  # type: ignore[arg-type]
    )
    return {name: found["up" if name == "gate_up" else name] for name in matrices}


def _projection(
    module: nn.Module, num_experts: int, settings: MPOSettings
) -> ResidualProjection | HiddenProjection:
    place: dict[str, Any] = {
        "device": device_of_linear(module), "dtype": dtype_of_linear(module)
    }  # fmt: skip
    projection: ResidualProjection | HiddenProjection
    if settings.layout == "residual":
        # Torch's global generator seeds the draw, as it draws the numbers of torch's own layers.
        seed = int(torch.randint(2**62, (), device="cpu"))
        delta = new_delta(num_experts, settings, rng=seed, **place)
        projection = ResidualProjection(module, delta)
    else:
        projection = HiddenProjection.from_linear(
            module, num_experts, settings.shape, settings.center_site
        )
    _lend(projection, "base", module)
    return projection


def borrow(experts: Experts, matrices: Mapping[str, nn.Module]) -> None:
    """Let experts use these linear modules, which belong to other parts of the model.

    Parameters
    ----------
    experts : Experts
        Of :func:`new_mixture_beside`.
    matrices : mapping from str to Module
        By projection.
    """
    for name, projection in experts.projections().items():
        if vars(projection).get("base") is not matrices[name]:
            _lend(projection, "base", matrices[name])


def _lend(borrower: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module an attribute of another one, and no submodule."""
    borrower._modules.pop(name, None)
    vars(borrower)[name] = module


def own_parts(experts: Experts) -> dict[str, MPOProjection]:
    """Return what experts own of each matrix, by projection."""
    found: dict[str, MPOProjection] = {}
    for name, projection in experts.projections().items():
        own: Any = projection.delta if isinstance(projection, ResidualProjection) else projection
        found[name] = own
    return found
