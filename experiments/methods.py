"""The methods that are compared: each makes a model from the same dense one, and trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments import variants
from experiments.variants import owned_parameters
from tnmoe import hf
from tnmoe.nn import GradientMask, SharedGradientScale, freeze_shared, shared_parameters

# Functions of (dense model, configuration): Adapt returns a configuration, Build a model.
Adapt = Callable[[PreTrainedModel, hf.MPOEConfig], hf.MPOEConfig]
Build = Callable[[PreTrainedModel, hf.MPOEConfig], PreTrainedModel]

_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes
    ----------
    meaning : str
        Description for the tables.
    settings : mapping
        Settings of :class:`tnmoe.hf.MPOEConfig`, in addition to the setting's own.
    adapt : callable, optional
        Changes settings that depend on the model's sizes.
    build : callable
        Makes the model; by default :func:`tnmoe.hf.upcycle`.
    mask : float
        Probability of the gradient mask.
    shared_rate : float
        Learning rate of the cores that experts share, relative to the rate of all other
        parameters; 0 freezes them.
    owned_rate : float
        Relative learning rate of the parameters that each expert owns.
    shared_gradient_scale : bool
        Divide the gradients of shared cores by the number of experts.
    fresh : bool
        Draw all feed-forward weights at random instead of keeping the pretrained ones.
    """

    meaning: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapt: Adapt | None = None
    build: Build = hf.upcycle
    mask: float = 0.0
    shared_rate: float = 1.0
    owned_rate: float = 1.0
    shared_gradient_scale: bool = False
    fresh: bool = False

    def model(self, dense: PreTrainedModel, **settings: Any) -> PreTrainedModel:
        """Make the model to train; torch's global generator draws routers and noise."""
        config = hf.MPOEConfig(**{**settings, **self.settings})
        if self.adapt is not None:
            config = self.adapt(dense, config)
        model = self.build(dense, config)
        if self.fresh:
            variants.draw_feed_forward_anew(model, config)
        return model

    def optimizer(self, model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
        """Make an AdamW for the parameters that the method trains, with its learning rates."""
        if self.shared_rate == 0:
            freeze_shared(model)
        rates = {id(core): self.shared_rate for core in shared_parameters(model)}
        rates |= {id(each): self.owned_rate for each in owned_parameters(model)}
        groups: dict[float, list[Any]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                groups.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": each, "lr": rate * learning_rate} for rate, each in groups.items()],
            weight_decay=_WEIGHT_DECAY,
        )

    def attach(
        self, stack: ExitStack, model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int
    ) -> GradientMask | None:
        """Attach the method's hooks until the stack closes; return its mask, if it has one."""
        if self.shared_gradient_scale:
            stack.enter_context(SharedGradientScale(model))
        if self.mask:
            return stack.enter_context(GradientMask(optimizer, model, self.mask, seed=seed))
        return None


def _dense(model: PreTrainedModel, config: hf.MPOEConfig) -> PreTrainedModel:
    return model


def _split(group: int) -> Adapt:
    """Return a function that sets split shapes with groups of a size, or the largest that fits."""

    def adapt(model: PreTrainedModel, config: hf.MPOEConfig) -> hf.MPOEConfig:
        return replace(config, shapes=variants.split_shapes(model, config, group))

    return adapt


def _half_bond(model: PreTrainedModel, config: hf.MPOEConfig) -> hf.MPOEConfig:
    """Halve the largest bond."""
    largest = max(
        max(config.shape_for("up", *size).bond_dims())
        for size in variants.matrix_sizes(model, config)
    )
    return replace(config, max_bond=largest // 2)


def _share_all_but_center(model: PreTrainedModel, config: hf.MPOEConfig) -> hf.MPOEConfig:
    center = {
        name: config.shape_for(name, *size).center_site
        for name, size in variants.first_sizes(model, config).items()
    }
    sites = range(config.shape_for("up", *variants.first_sizes(model, config)["up"]).sites)
    return replace(
        config, shared_sites={n: [s for s in sites if s != c] for n, c in center.items()}
    )


MOE = {"layout": "dense"}
_TOP2 = {"num_experts_per_tok": 2}

METHODS: dict[str, Method] = {
    "dense": Method("dense model", build=_dense),
    "dense-wide": Method("dense, widened to MPOE's parameters", build=variants.widened),
    "moe": Method("ordinary mixture, top-1 (Switch)", MOE),
    "moe-top2": Method("ordinary mixture, top-2", MOE | _TOP2),
    "mpoe": Method("MPOE, interleaved, exact bonds"),
    "mpoe-top2": Method("MPOE, interleaved, top-2", _TOP2),
    "mpoe-half": Method("MPOE, largest bond halved", adapt=_half_bond),
    "split-16": Method("MPOE, split, groups of 16", adapt=_split(16)),
    "split-64": Method("MPOE, split, groups of 64", adapt=_split(64)),
    "split-128": Method("MPOE, split, groups of 128", adapt=_split(128)),
    "mpoe-mask-0.25": Method("MPOE, gradient mask 0.25", mask=0.25),
    "mpoe-mask-0.5": Method("MPOE, gradient mask 0.5", mask=0.5),
    "mpoe-mask-0.9": Method("MPOE, gradient mask 0.9", mask=0.9),
    "mpoe-frozen": Method("MPOE, central cores frozen", shared_rate=0),
    "mpoe-slow-0.1": Method("MPOE, central learning rate × 0.1", shared_rate=0.1),
    # An expert sees 1/E of the tokens; with the noise of Adam's steps a rate of 1/√E may suit it.
    "moe-owned-0.35": Method("ordinary mixture, experts' rate × 0.35", MOE, owned_rate=0.35),
    "mpoe-owned-0.35": Method("MPOE, auxiliary learning rate × 0.35", owned_rate=0.35),
    "mpoe-owned-0.1": Method("MPOE, auxiliary learning rate × 0.1", owned_rate=0.1),
    "mpoe-owned-4": Method("MPOE, auxiliary learning rate × 4", owned_rate=4),
    "split-64-owned-0.35": Method(
        "MPOE, split 64, auxiliary learning rate × 0.35", adapt=_split(64), owned_rate=0.35
    ),
    "split-64-top2": Method("MPOE, split 64, top-2", _TOP2, adapt=_split(64)),
    "mpoe-top2-owned-0.35": Method("MPOE, top-2, auxiliary rate × 0.35", _TOP2, owned_rate=0.35),
    "split-64-top2-owned-0.35": Method(
        "MPOE, split 64, top-2, auxiliary rate × 0.35", _TOP2, adapt=_split(64), owned_rate=0.35
    ),
    "mpoe-schmidt": Method("MPOE, Schmidt gauge", {"gauge": "schmidt"}),
    "split-64-schmidt": Method(
        "MPOE, split 64, Schmidt gauge", {"gauge": "schmidt"}, adapt=_split(64)
    ),
    "mpoe-scaled": Method("MPOE, central gradient / E", shared_gradient_scale=True),
    "mpoe-noise": Method("MPOE, auxiliary noise 0.1", {"expert_noise": 0.1}),
    "moe-noise": Method("ordinary mixture, noise 0.1", MOE | {"expert_noise": 0.1}),
    "split-64-mask-0.5": Method("MPOE, split 64, gradient mask 0.5", adapt=_split(64), mask=0.5),
    "share-rest": Method(
        "MPO experts that share all cores but the central one", adapt=_share_all_but_center
    ),
    "separate": Method(
        "MPO experts that share nothing, truncated to MPOE's parameters",
        {"shared_sites": "none"},
        adapt=variants.bonds_for_equal_parameters,
    ),
    "low-rank": Method(
        "dense matrices shared, low-rank terms owned, MPOE's parameters", build=variants.low_rank
    ),
    "dense-fresh": Method("dense, feed-forward drawn anew", build=_dense, fresh=True),
    "moe-fresh": Method("ordinary mixture, drawn anew", MOE, fresh=True),
    "mpoe-fresh": Method("MPOE, drawn anew", fresh=True),
}

for _experts in (2, 4, 16, 32):
    _count = {"num_experts": _experts}
    METHODS[f"moe-e{_experts}"] = Method(f"ordinary mixture of {_experts}", MOE | _count)
    METHODS[f"mpoe-e{_experts}"] = Method(f"MPOE of {_experts}", _count)
    METHODS[f"split-64-e{_experts}"] = Method(
        f"MPOE, split 64, of {_experts}", _count, adapt=_split(64)
    )
