"""tnmoe's grouped products in transformers' own mixtures of experts.

Once ``tnmoe.hf`` is imported, classes whose experts have several implementations also accept
``experts_implementation="tnmoe"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tnmoe.nn.compute.grouped import grouped_linear, per_row
from tnmoe.nn.compute.slots import DenseDispatch, Groups, combine, dispatch, zero_unrouted
from tnmoe.nn.transforms import autocast_dtype, is_transformed, values_are_readable

# Value of ``experts_implementation`` that chooses this one.
NAME = "tnmoe"


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the forward pass of an experts module of transformers.

    Parameters
    ----------
    experts : Module
        A module with stacked ``gate_up_proj`` or ``up_proj``, and ``down_proj``, as transformers'
        ``use_experts_implementation`` describes them.
    hidden_states : Tensor, shape (T, H)
    top_k_index : Tensor of int64, shape (T, k)
        Experts of every token. An index that is not below the number of experts marks a choice
        without an expert; its output is zero.
    top_k_weights : Tensor, shape (T, k)
        Weights of the experts in the sum.

    Returns
    -------
    Tensor, shape (T, H)
        In the dtype of ``hidden_states``.

    Examples
    --------
    >>> from transformers import MixtralConfig, MixtralModel
    >>> config = MixtralConfig(
    ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2,
    ... )
    >>> MixtralModel(config).set_experts_implementation("tnmoe")
    """
    if is_transformed():
        return _run_densely(experts, hidden_states, top_k_index, top_k_weights)
    groups = Groups.of(top_k_index.reshape(-1), experts.num_experts)
    unrouted = _unrouted(groups, experts.num_experts)
    if unrouted is not None:
        top_k_weights = top_k_weights.masked_fill(top_k_index >= experts.num_experts, 0)
    rows = zero_unrouted(dispatch(hidden_states, groups, top_k_index.shape[1]), unrouted)
    inner = zero_unrouted(_project(experts, _input_projection(experts), rows, groups), unrouted)
    outputs = _project(experts, "down_proj", _activated(experts, inner), groups)
    outputs = _normed(experts, zero_unrouted(outputs, unrouted))
    return combine(outputs, groups, top_k_weights).to(hidden_states.dtype)


def _run_densely(experts: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Apply every expert to every token, and to zeros where the expert was not chosen.

    For ``torch.func``, whose transforms do not let code depend on the number of an expert's tokens.
    """
    table = DenseDispatch.of(index, weights, experts.num_experts)
    into = _project(experts, _input_projection(experts), table.dispatch(states), table)
    into = table.mask(into)
    inner = _activated(experts, into.flatten(0, 1)).unflatten(0, into.shape[:2])
    outputs = _project(experts, "down_proj", table.mask(inner), table)
    return table.combine(_normed(experts, table.mask(outputs))).to(states.dtype)


def _input_projection(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _activated(experts: Any, inner: Tensor) -> Tensor:
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


def _normed(experts: Any, outputs: Tensor) -> Tensor:
    return experts.post_expert_norm(outputs) if experts.has_post_expert_norm else outputs


def _unrouted(groups: Groups, num_experts: int) -> Tensor | None:
    """Return which rows have no expert, (N,) of bool; None if all are known to have one."""
    if values_are_readable(groups.offsets) and int(groups.offsets[-1]) == groups.layer_slots:
        return None
    return groups.experts >= num_experts


def _project(experts: Any, name: str, rows: Tensor, groups: Groups | DenseDispatch) -> Tensor:
    """Apply one projection of all experts, each to its own rows."""
    weight = getattr(experts, name)
    dtype = autocast_dtype(rows) or weight.dtype
    stacked = (weight.mT if experts.is_transposed else weight).to(dtype)
    bias = getattr(experts, f"{name}_bias").to(dtype) if experts.has_bias else None
    if isinstance(groups, DenseDispatch):
        result = torch.einsum("tei,eoi->teo", rows.to(dtype), stacked)
        return result if bias is None else result + bias
    result = grouped_linear(rows.to(dtype), stacked, groups.offsets)
    return result if bias is None else result + per_row(bias, groups)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
