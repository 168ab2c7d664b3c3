"""Ordinary mixtures of transformers: every expert is a separate network."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from library import Unsupported
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

# transformers' ways to compute the same stacked experts.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# batched_mm copies the matrices of every slot. More than this is refused: it takes minutes.
MAX_COPIED_BYTES = 4 * 2**30


class SwitchLoop(nn.Module):
    """transformers' Switch experts: a loop over experts with index_add_."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        config = SwitchTransformersConfig(
            d_model=hidden, d_ff=inner, num_experts=experts, dropout_rate=0.0
        )
        self.experts, self.count = SwitchTransformersExperts(config), experts

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(states, F.one_hot(index, self.count), weights)


class _Stacked(nn.Module):
    """Matrices of all experts, one stack per projection, and transformers' loop over them."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts, self.gated = config.experts, config.gated
        for name, weight in config.weights.items():
            self.register_parameter(name, weight)
        self.act_fn = F.silu if config.gated else F.relu
        if config._experts_implementation == "batched_mm":
            self.register_forward_pre_hook(_refuse_large_copies)

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Loop over experts, as transformers' models do with ``eager``."""
        outputs = torch.zeros_like(states)
        chosen = F.one_hot(index, self.num_experts).permute(2, 1, 0)
        for expert in chosen.sum(dim=(-1, -2)).nonzero()[:, 0]:
            choice, tokens = torch.where(chosen[expert])
            inner = self._inner(states[tokens], expert)
            rows = F.linear(inner, self.down_proj[expert]) * weights[tokens, choice, None]
            outputs.index_add_(0, tokens, rows)
        return outputs

    def _inner(self, rows: Tensor, expert: Tensor) -> Tensor:
        if not self.gated:
            return self.act_fn(F.linear(rows, self.up_proj[expert]))
        gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act_fn(gate) * up


@use_experts_implementation
class _GatedStacked(_Stacked):
    pass


@use_experts_implementation(has_gate=False)
class _PlainStacked(_Stacked):
    pass


def stacked_weights(experts: int, hidden: int, inner: int, gated: bool) -> dict[str, nn.Parameter]:
    """Draw the matrices of all experts under transformers' names."""
    up = torch.randn(experts, inner * (2 if gated else 1), hidden) / hidden**0.5
    down = torch.randn(experts, hidden, inner) / inner**0.5
    name = "gate_up_proj" if gated else "up_proj"
    return {name: nn.Parameter(up), "down_proj": nn.Parameter(down)}


def stacked_experts(weights: dict[str, nn.Parameter], implementation: str) -> nn.Module:
    """Build experts on given matrices, computed by one of transformers' implementations."""
    gated = "gate_up_proj" in weights
    config = SimpleNamespace(
        experts=len(weights["down_proj"]), gated=gated, weights=weights,
        _experts_implementation=implementation,
    )  # fmt: skip
    return (_GatedStacked if gated else _PlainStacked)(config)


def _refuse_large_copies(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Refuse a call that copies too many matrices."""
    slots = arguments[1].numel()
    copied = slots * sum(weight[0].numel() * weight.element_size() for weight in layer.parameters())
    if copied > MAX_COPIED_BYTES:
        raise Unsupported(f"copies {copied / 2**30:.0f} GiB")
