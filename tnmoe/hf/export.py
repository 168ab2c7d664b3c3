"""MPOE models as models that other software runs: ordinary mixtures, and dense networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.export_targets import target_of
from tnmoe.hf.families import FFN, weight_of
from tnmoe.hf.layers import check_in_memory, check_model, mixtures_of, networks_named
from tnmoe.hf.record import config_of, required_record, unmark
from tnmoe.nn.moe import MPOMoE


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
        If the model is no converted one, or is not in memory as a whole.
    TypeError
        If it is no model of transformers, but a wrapper around one.

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
    record = required_record(model)
    check_in_memory(model, "tnmoe.hf.prepare_export")
    plain = copy.deepcopy(model.config)
    unmark(plain)
    dense = _new(type(model), plain, model)
    ffns = networks_named(dense, record.networks)
    networks = [matrix for ffn in ffns for matrix in ffn.matrices.values()]
    mixtures = mixtures_of(model)
    _fill(dense, _outside(model, mixtures), networks)
    for ffn, layer in zip(ffns, mixtures.values(), strict=True):
        average_into(ffn, layer)
    return dense


def average_into(ffn: FFN, layer: MPOMoE) -> None:
    """Give a dense network the mean of a mixture's experts."""
    for name, matrix in ffn.matrices.items():
        projection = getattr(layer.experts, name)
        weight_of(matrix).copy_(projection.weight().mean(0))
        if matrix.bias is not None:
            matrix.bias.copy_(projection.bias.mean(0))


@torch.no_grad()
def to_moe(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as an ordinary mixture of experts, which serving engines know.

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
        A converted model of a class above; it stays as it is. Experts have no biases, and routers
        of type :class:`tnmoe.nn.TopKRouter` none of the settings that these classes lack.

    Returns
    -------
    PreTrainedModel
        A new model, in the same dtype and mode, on the same device. Nothing is shared there: it is
        as large as an ordinary mixture.

    Raises
    ------
    InputError
        If the model is no converted one or not in memory as a whole, or has something that the
        other class cannot express.
    TypeError
        If it is no model of transformers, but a wrapper around one.

    Notes
    -----
    The function is that out of training: noise and capacities that only training knows are not
    carried over, and jitter only where the class has it. In half precision, the Mixtral and Qwen
    classes compute routers' logits in that precision and not in float32 as here, so close choices
    may fall otherwise.

    Switch multiplies an expert's output by its probability. Where weights are to be 1 instead
    (``normalize``, the default), the router is multiplied by 2⁶⁴: the probability of the same
    expert then rounds to 1, unless the two best logits are equal to the last bit. Such a router
    learns nothing more, and does not fit into float16. Switch's capacity is set so high that no
    token is dropped.

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
    config = config_of(model)
    check_in_memory(model, "tnmoe.hf.prepare_export")
    target, mixtures = target_of(model), mixtures_of(model)
    for layer in mixtures.values():
        target.check(layer)
    moe = _new(target.model_class, target.config(model, mixtures, config), model)
    blocks = {path: moe.get_submodule(target.rename(path)) for path in mixtures}
    rest = {target.rename(name): each for name, each in _outside(model, mixtures).items()}
    _fill(moe, rest, blocks.values())
    for path, layer in mixtures.items():
        blocks[path].load_state_dict(target.weights(layer))
    return moe


def _new(make: Any, config: Any, model: PreTrainedModel) -> Any:
    """A new model in the state of another one; its numbers are of no use yet."""
    # Unlike a conversion afterwards, this leaves tables of rotary embeddings in float32.
    with model.device:
        other = make._from_config(config, dtype=model.dtype)
    if model.can_generate():
        other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)


def _outside(model: nn.Module, mixtures: Iterable[str]) -> dict[str, Tensor]:
    """What a model holds beside its mixtures, which are at these paths."""
    inside = tuple(f"{path}." for path in mixtures)
    return {name: each for name, each in model.state_dict().items() if not name.startswith(inside)}


def _fill(other: nn.Module, tensors: Mapping[str, Tensor], networks: Iterable[nn.Module]) -> None:
    """Copy tensors by name to where they fit: everywhere but in the networks."""
    own = {id(each) for network in networks for each in network.parameters()}
    theirs = {
        name: each for name, each in other.state_dict(keep_vars=True).items() if id(each) not in own
    }
    _check_none(other, "has no place for", tensors.keys() - theirs.keys())
    _check_none(other, "needs", theirs.keys() - tensors.keys())
    other.load_state_dict(tensors, strict=False)
    changed = {
        name for name, each in theirs.items() if not torch.equal(tensors[name].to(each), each)
    }
    _check_none(other, "ties what the model does not", changed)


def _check_none(other: nn.Module, what: str, names: Iterable[str]) -> None:
    if named := sorted(names):
        raise InputError(f"{type(other).__name__} {what}: {', '.join(named[:4])}")
