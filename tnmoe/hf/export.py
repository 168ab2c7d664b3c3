"""MPOE models as models that other software runs: ordinary mixtures, and dense networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.checkpoint import METHOD
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.families import find_ffns, weight_of
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.router import TopKRouter


@torch.no_grad()
def average_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model again: every network has the mean of its experts' matrices and biases.

    That is the model itself only as long as experts are alike. Experts that have been trained
    apart are averaged, not merged with care: measure what it costs. Routers are left out.

    Parameters
    ----------
    model : PreTrainedModel
        A converted model; it stays as it is.

    Returns
    -------
    PreTrainedModel
        A new model of the same class, as it was before :func:`upcycle`.

    Raises
    ------
    InputError
        If the model is no converted one.
    """
    config = _config_of(model)
    make: Any = type(model)
    dense = make(_plain_config(model)).to(dtype=model.dtype)
    ffns = find_ffns(dense, config.layers, config.every)
    networks = [matrix for ffn in ffns for matrix in ffn.matrices.values()]
    _copy_the_rest(model, dense, networks)
    for ffn, layer in zip(ffns, _layers(model), strict=True):
        for name, matrix in ffn.matrices.items():
            projection = getattr(layer.experts, name)
            weight_of(matrix).copy_(projection.weight().mean(0))
            if matrix.bias is not None:
                matrix.bias.copy_(projection.bias.mean(0))
    return dense.to(model.device).train(model.training)


@torch.no_grad()
def to_mixtral(model: PreTrainedModel) -> MixtralForCausalLM:
    """The same function as a Mixtral model, which serving engines know: nothing is shared there.

    Parameters
    ----------
    model : PreTrainedModel
        A Llama or Mistral for causal language modelling, converted in all its layers, without
        biases, and with plain top-k routers.

    Returns
    -------
    MixtralForCausalLM
        A new model, in the same dtype, on the same device.

    Raises
    ------
    InputError
        If Mixtral cannot express the model, with what it cannot.
    """
    config = _config_of(model)
    layers = _layers(model)
    _check_mixtral(model, config, layers)
    known = set(MixtralConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    source = {key: value for key, value in _plain_config(model).to_dict().items() if key in known}
    source |= {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.balance_weight,
    }
    make: Any = MixtralForCausalLM
    mixtral = make(MixtralConfig(**source)).to(dtype=model.dtype)
    _copy_the_rest(model, mixtral, [block.mlp for block in mixtral.model.layers])
    for block, layer in zip(mixtral.model.layers, layers, strict=True):
        experts = layer.experts
        assert experts.gate is not None
        block.mlp.gate.weight.copy_(layer.router.weight)
        both = torch.cat([experts.gate.weight(), experts.up.weight()], dim=1)
        block.mlp.experts.gate_up_proj.copy_(both)
        block.mlp.experts.down_proj.copy_(experts.down.weight())
    return mixtral.to(model.device).train(model.training)


def _check_mixtral(model: PreTrainedModel, config: MPOEConfig, layers: list[MPOMoE]) -> None:
    kind, total = model.config.model_type, model.config.num_hidden_layers
    if kind not in ("llama", "mistral") or not type(model).__name__.endswith("ForCausalLM"):
        raise InputError(
            "only LlamaForCausalLM and MistralForCausalLM become Mixtral, got "
            f"{type(model).__name__}"
        )
    if len(layers) != total:
        raise InputError(f"Mixtral has experts in all {total} layers, the model in {len(layers)}")
    if any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise InputError("Mixtral has no biases, the model has some")
    for layer in layers:
        plain = TopKRouter(layer.router.hidden_size, config.num_experts, config.num_experts_per_tok)
        differs = [
            name
            for name, value in vars(plain).items()
            if isinstance(value, bool | int | float | str | None)
            and name not in ("training", "jitter_noise", "straight_through")
            and getattr(layer.router, name, value) != value
        ]
        if differs or type(layer.router) is not TopKRouter or layer.router.load_bias is not None:
            raise InputError(
                "Mixtral has softmax top-k routers with weights that sum to 1, the model has "
                f"{layer.router}{' with ' + ', '.join(differs) if differs else ''}"
            )


def _config_of(model: PreTrainedModel) -> MPOEConfig:
    stored: Any = getattr(model.config, "quantization_config", None)
    if getattr(stored, "quant_method", None) != METHOD:
        raise InputError(
            f"{type(model).__name__} is no converted model: it has no experts of tnmoe"
        )
    return MPOEConfig.from_dict(stored.mpoe)


def _plain_config(model: PreTrainedModel) -> Any:
    """The model's configuration without what :func:`upcycle` wrote into it."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return config


def _layers(model: nn.Module) -> list[MPOMoE]:
    return [module for module in model.modules() if isinstance(module, MPOMoE)]


def _copy_the_rest(model: nn.Module, other: nn.Module, networks: Iterable[nn.Module]) -> None:
    """Everything but the networks, which has the same names in both."""
    own = {id(each) for network in networks for each in network.parameters()}
    ours, theirs = model.state_dict(), other.state_dict(keep_vars=True)
    if lost := [n for n, each in theirs.items() if n not in ours and id(each) not in own]:
        raise InputError(f"{type(model).__name__} has nothing for {', '.join(lost[:4])}")
    other.load_state_dict({name: ours[name] for name in theirs if name in ours}, strict=False)
