"""tnmoe's grouped products under the mixtures of experts of transformers.

With ``tnmoe.hf`` imported, classes that let one choose how their experts are computed take
``experts_implementation="tnmoe"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tnmoe.nn.grouped import Groups, grouped_linear, spread

NAME = "tnmoe"


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module of transformers.

    Parameters
    ----------
    experts : Module
        Holds stacked ``gate_up_proj`` or ``up_proj``, and ``down_proj``, as transformers'
        ``use_experts_implementation`` describes them.
    hidden_states : Tensor, shape (T, H)
    top_k_index : Tensor of int64, shape (T, k)
        Experts of every token; the number of experts, or more, is none of them.
    top_k_weights : Tensor, shape (T, k)
        Their weights in the sum.

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
    choices = top_k_index.shape[1]
    groups = Groups.of(top_k_index.reshape(-1), experts.num_experts)
    nowhere = _nowhere(groups, experts.num_experts)
    rows = _cleared(spread(hidden_states, groups.order, groups.inverse, choices), nowhere)
    into = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", rows, groups)
    into = _cleared(into, nowhere)
    inner = experts._apply_gate(into) if experts.has_gate else experts.act_fn(into)
    outputs = _cleared(_project(experts, "down_proj", inner, groups), nowhere)
    if experts.has_post_expert_norm:
        outputs = experts.post_expert_norm(outputs)
    outputs = spread(outputs, groups.inverse, groups.order).unflatten(0, top_k_index.shape)
    return (outputs * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


def _nowhere(groups: Groups, num_experts: int) -> Tensor | None:
    """Rows without an expert, (rows, 1); None where it is known that there are none."""
    waits = groups.offsets.device.type == "cpu" and not torch.compiler.is_compiling()
    if waits and int(groups.offsets[-1]) == groups.rows:
        return None
    return (groups.experts >= num_experts)[:, None]


def _cleared(rows: Tensor, nowhere: Tensor | None) -> Tensor:
    """Rows that no product is taken of are zero, and so are their gradients."""
    return rows if nowhere is None else rows.masked_fill(nowhere, 0)


def _project(experts: Any, name: str, rows: Tensor, groups: Groups) -> Tensor:
    """One projection of all experts, each of its own rows."""
    weight = getattr(experts, name)
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    stacked = weight.mT if experts.is_transposed else weight
    result = grouped_linear(rows.to(dtype), stacked.to(dtype), groups.offsets)
    if not experts.has_bias:
        return result
    # A product with the experts' indicators: its gradient, too, is one, not a scatter.
    bias = getattr(experts, f"{name}_bias").to(dtype)
    mine = groups.experts[:, None] == torch.arange(len(bias), device=rows.device)
    return torch.addmm(result, mine.to(dtype), bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
