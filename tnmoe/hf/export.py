"""MPOE models exported to what other software runs: ordinary mixtures and dense models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.checks import check_in_memory, check_model
from tnmoe.hf.export_targets import target_of
from tnmoe.hf.ffn import FFN, weight_of
from tnmoe.hf.find import ffns_named, mixtures_in
from tnmoe.hf.ordinary import compressed_in, ordinary_experts
from tnmoe.hf.record import check_no_linear, config_of, remove_records, required_record
from tnmoe.nn.moe import MPOMoE
from tnmoe.system.tables import listed


@torch.no_grad()
def average_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Make a dense model whose networks are the means of their experts' matrices and biases.

    The dense model computes the same only as long as experts are equal. Trained experts are
    averaged as they are, without a method of merging: measure what that costs. Routers are left
    out.

    Parameters
    ----------
    model : PreTrainedModel
        A converted model; it stays as it is.

    Returns
    -------
    PreTrainedModel
        A new model of the same class, with the structure from before :func:`upcycle`.

    Raises
    ------
    InputError
        If the model is not converted, is not in memory as a whole, or has linear layers that are
        MPOs.
    TypeError
        If the model is not a model of transformers, but a wrapper around one, for instance.

    Examples
    --------
    >>> from tnmoe.hf import MPOEConfig, upcycle
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **small))
    >>> model = upcycle(model, MPOEConfig(num_experts=4, sites=3))
    >>> type(average_experts(model).model.layers[0].mlp).__name__
    'LlamaMLP'
    """
    check_model(model)
    config_of(model)  # raises for a model without dense networks in its past
    record = required_record(model)
    check_no_linear(record, type(model).__name__, "use hf.untensorize first")
    check_in_memory(model, "tnmoe.hf.prepare_export")
    config = copy.deepcopy(model.config)
    remove_records(config)
    dense = _empty_like(model, type(model), config)
    ffns = ffns_named(dense, record.networks)
    matrices = [matrix for ffn in ffns for matrix in ffn.matrices.values()]
    mixtures = mixtures_in(model)
    _copy_tensors(_outside_mixtures(model, mixtures), dense, matrices)
    for ffn, layer in zip(ffns, mixtures.values(), strict=True):
        average_into(ffn, layer)
    return dense


def average_into(ffn: FFN, layer: MPOMoE) -> None:
    """Write the mean of a mixture's experts into a dense network."""
    matrices, biases = layer.experts.matrices(), layer.experts.biases()
    for name, matrix in ffn.matrices.items():
        weight_of(matrix).copy_(matrices[name].mean(0))
        if matrix.bias is not None:
            matrix.bias.copy_(biases[name].mean(0))


@torch.no_grad()
def to_moe(model: PreTrainedModel) -> PreTrainedModel:
    """Make an ordinary mixture of experts that computes the same, for serving engines.

    A model that :func:`compress` made smaller comes back in the class that it has: the experts'
    matrices are written out whole. The class of an upcycled model depends on the model's:

    ===========================  ================================================================
    ``LlamaForCausalLM``,        ``MixtralForCausalLM``: experts in all layers, weights that sum
    ``MistralForCausalLM``       to 1
    ``Qwen2ForCausalLM``         ``Qwen2MoeForCausalLM``, whose shared expert is zero
    ``Qwen3ForCausalLM``         ``Qwen3MoeForCausalLM``
    ``T5ForConditionalGen…``     ``SwitchTransformersForConditionalGeneration``: one expert per
                                 token, no gates; per stack, experts in no layer, in all, or in
                                 layers 1, 1 + n, 1 + 2 n, …
    ===========================  ================================================================

    Parameters
    ----------
    model : PreTrainedModel
        A compressed model, or an upcycled one of a class above; it stays as it is. The experts of
        an upcycled model must have no biases, and its routers must be of type
        :class:`tnmoe.nn.TopKRouter`, without settings that the other class lacks.

    Returns
    -------
    PreTrainedModel
        A new model, in the same dtype and mode, on the same device. Its experts share nothing: it
        is as large as any ordinary mixture.

    Raises
    ------
    InputError
        If the model is not converted, is not in memory as a whole, or has something that the other
        class cannot express, such as linear layers that are MPOs.
    TypeError
        If the model is not a model of transformers, but a wrapper around one, for instance.

    Notes
    -----
    Both models compute the same in evaluation. Noise and capacities that act in training alone are
    not carried over, and jitter only if the class has it. In half precision, the Mixtral and Qwen
    classes compute routers' logits in that precision, where tnmoe computes them in float32. Between
    experts with nearly equal logits they may then choose another one.

    Switch multiplies an expert's output by its probability. For weights of 1 (``normalize``, the
    default), the router is multiplied by 2⁶⁴: the probability of the chosen expert then rounds to
    1, unless the two best logits are equal to the last bit. Such a router no longer learns, and
    does not fit into float16. Switch's capacity is set so high that it drops no token.

    Examples
    --------
    >>> from tnmoe.hf import MPOEConfig, upcycle
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **small))
    >>> model = upcycle(model, MPOEConfig(num_experts=4, sites=3))
    >>> type(to_moe(model)).__name__
    'MixtralForCausalLM'
    """
    check_model(model)
    record = required_record(model)
    check_no_linear(record, type(model).__name__, "use hf.untensorize first")
    check_in_memory(model, "tnmoe.hf.prepare_export")
    if record.config is None:
        return _with_ordinary_experts(model)
    config = record.config
    target, mixtures = target_of(model), mixtures_in(model)
    for layer in mixtures.values():
        target.check(layer)
    moe = _empty_like(model, target.model_class, target.config(model, mixtures, config))
    blocks = {path: moe.get_submodule(target.rename(path)) for path in mixtures}
    outside = _outside_mixtures(model, mixtures)
    rest = {target.rename(name): tensor for name, tensor in outside.items()}
    _copy_tensors(rest, moe, blocks.values())
    for path, layer in mixtures.items():
        blocks[path].load_state_dict(target.weights(layer))
    return moe


def _with_ordinary_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model of the same class, in which compressed experts are ordinary ones again."""
    config = copy.deepcopy(model.config)
    remove_records(config)
    ordinary = _empty_like(model, type(model), config)
    experts = compressed_in(model)
    found = {each.name: each for each in ordinary_experts(ordinary) if each.name in experts}
    modules = [each.module for each in found.values()]
    _copy_tensors(_outside_mixtures(model, experts), ordinary, modules)
    for path, each in found.items():
        each.module.load_state_dict(each.format.tensors(each.module, experts[path]))
    return ordinary


def _empty_like(model: PreTrainedModel, model_class: Any, config: Any) -> Any:
    """Make a model in the dtype, device and mode of another one; its numbers mean nothing yet."""
    # Converting the dtype afterwards would also convert tables of rotary embeddings, which
    # transformers keeps in float32.
    with model.device:
        other = model_class._from_config(config, dtype=model.dtype)
    if model.can_generate():
        other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)


def _outside_mixtures(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a model outside of its mixtures, which are at these paths."""
    inside = tuple(f"{path}." for path in paths)
    return {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)
    }


def _copy_tensors(
    tensors: Mapping[str, Tensor], target: nn.Module, excluded: Iterable[nn.Module]
) -> None:
    """Copy tensors by name into a model.

    Parameters
    ----------
    tensors : mapping from str to Tensor
    target : Module
    excluded : iterable of Module
        Modules of the target that these tensors do not belong to.

    Raises
    ------
    InputError
        If the names are not exactly those of the target outside of the excluded modules, or the
        target ties tensors that differ.
    """
    own = {id(parameter) for module in excluded for parameter in module.parameters()}
    present = {
        name: tensor
        for name, tensor in target.state_dict(keep_vars=True).items()
        if id(tensor) not in own
    }
    _check_empty(target, "has no place for", tensors.keys() - present.keys())
    _check_empty(target, "needs", present.keys() - tensors.keys())
    target.load_state_dict(tensors, strict=False)
    changed = {
        name
        for name, tensor in present.items()
        if not torch.equal(tensors[name].to(tensor), tensor)
    }
    _check_empty(target, "ties what the model does not", changed)


def _check_empty(model: nn.Module, complaint: str, names: Iterable[str]) -> None:
    if found := list(names):
        raise InputError(f"{type(model).__name__} {complaint}: {listed(found)}")
