"""Dense feed-forward networks → mixtures of experts, without changing the model's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import FFN, check_formula, find_ffns, weight_of
from tnmoe.hf.layers import check_in_memory, check_model, expert_settings, new_router
from tnmoe.hf.record import check_unconverted, mark, own_configuration
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.nn.experts import DenseExperts, Experts
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.routing.router import Router
from tnmoe.system.memory import memory_for
from tnmoe.truncation.info import TruncationInfo


def upcycle(
    model: PreTrainedModel,
    config: MPOEConfig,
    on_matrix: Callable[[str, TruncationInfo], None] | None = None,
) -> PreTrainedModel:
    """Turn the dense feed-forward networks of a pretrained model into mixtures of experts.

    Every expert starts as the pretrained network. With exact bonds, no expert noise and weights
    that sum to 1 (see :class:`tnmoe.nn.TopKRouter`; the default) the model computes what it did,
    to rounding.

    Parameters
    ----------
    model : PreTrainedModel
        Converted in place: the networks of a known family (:func:`find_ffns`) give way to
        :class:`tnmoe.nn.MPOMoE` modules on their device and in their dtype.
    config : MPOEConfig
        Experts, routing, shapes and which layers.
    on_matrix : callable, optional
        Called as ``on_matrix(name, info)`` after every decomposition, for progress and spectra.
        With ``max_bond`` set, ``info.error_bound`` tells what the truncation cost.

    Returns
    -------
    PreTrainedModel
        ``model``; ``save_pretrained`` and ``from_pretrained`` work on it as on any other. In
        training its loss holds those of its routers (:func:`attach_router_losses`).

    Raises
    ------
    InputError
        If the model has no known feed-forward network or one that does more than its family's,
        is already converted or quantized, or holds NaN or infinity.
    TypeError
        If these are no model of transformers, which a wrapper is not, and no MPOEConfig.

    Notes
    -----
    Routers and expert noise are drawn from torch's global generator: seed it to reproduce them.
    Sparse upcycling: Komatsuzaki et al., arXiv:2212.05055.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2)).eval()
    >>> tokens = torch.arange(8)[None]
    >>> before = model(tokens).logits
    >>> model = upcycle(model, MPOEConfig(num_experts=4, sites=3))
    >>> bool(torch.allclose(model(tokens).logits, before, atol=1e-4))
    True
    >>> type(model.transformer.h[0].mlp).__name__
    'MPOMoE'
    """
    _check_types(model, config)
    check_unconverted(model)
    check_in_memory(model, "tnmoe.hf.prepare_upcycle")
    # Everything is built before anything is replaced: an error leaves the model as it was.
    ffns = find_ffns(model, config.layers, config.every)
    for ffn in ffns:
        check_formula(ffn)
    layers = []
    for number, ffn in enumerate(ffns, start=1):
        with memory_for(f"converting {ffn.name}, network {number} of {len(ffns)}"):
            layers.append(converted(ffn, config, Draws.for_layer(ffn, config), on_matrix))
    for ffn, layer in zip(ffns, layers, strict=True):
        ffn.install(layer.train(model.training))
    own_configuration(model)
    _unmark_as_quantized(model)
    mark(model, config, [ffn.name for ffn in ffns])
    attach_router_losses(model, config)
    return model


def _unmark_as_quantized(model: PreTrainedModel) -> None:
    """Undo the marks of a quantizer that left floats, as that of GGUF files does.

    They would keep Trainer, ``half`` and others from treating the weights as floats.
    """
    vars(model.config).pop("quantization_config", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)


def _check_types(model: object, config: object) -> None:
    """Raise a TypeError unless these are a model of transformers and an MPOEConfig."""
    check_model(model)
    if not isinstance(config, MPOEConfig):
        raise TypeError(f"config must be an MPOEConfig, got {type(config).__qualname__}")


@dataclass(frozen=True)
class Draws:
    """What is drawn for a layer.

    Attributes
    ----------
    router : Router
    seed : int
        Of the noise on its experts.
    """

    router: Router
    seed: int

    @classmethod
    def for_layer(
        cls, ffn: FFN, config: MPOEConfig, device: torch.device | str | None = None
    ) -> Draws:
        """From torch's global generator; the router is on the device of the layer by default."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        return cls(new_router(ffn, config, device), seed)


def converted(
    ffn: FFN,
    config: MPOEConfig,
    draws: Draws,
    on_matrix: Callable[[str, TruncationInfo], None] | None = None,
) -> MPOMoE:
    """The layer that replaces a network and computes the same."""
    pretrained: dict[str, Any] = {}
    for name, matrix in ffn.matrices.items():
        pretrained |= {name: weight_of(matrix), f"{name}_bias": matrix.bias}
    pretrained |= {
        "common_bias": config.common_bias,
        "noise": config.expert_noise,
        "rng": np.random.default_rng(draws.seed),
    }
    settings = expert_settings(ffn, config)
    if config.layout == "dense":
        experts: Experts = DenseExperts.from_dense(**pretrained, **settings)
    else:
        report = on_matrix and (lambda name, info: on_matrix(f"{ffn.name}.{name}", info))
        experts = MPOExperts.from_dense(
            **pretrained, **settings, gauge=config.gauge, on_matrix=report
        )
    return MPOMoE(draws.router, experts, dropout=ffn.output_dropout)
