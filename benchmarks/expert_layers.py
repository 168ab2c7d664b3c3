"""The layers that the benchmark of experts compares; all are ``layer(states, index, weights)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from library import Unsupported
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

import tnmoe as tn
from tnmoe.nn import MPOExperts, MPOProjection

# Sizes of tnmoe's layers: bonds (None: exact) and groups of the split layout.
BONDS = (None, 128, 64, 32, 16, 8)
GROUPS = (32, 64, 128)


class DenseFFN(nn.Module):
    """One feed-forward network for all tokens, for comparison."""

    def __init__(self, hidden: int, inner: int, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, False), nn.Linear(inner, hidden, False)
        self.gate = nn.Linear(hidden, inner, False) if gated else None

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.relu(self.up(states)))
        return self.down(F.silu(self.gate(states)) * self.up(states))


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
    """Parameters in the layout that transformers' expert functions expect."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts, hidden, inner = config.experts, config.hidden, config.inner
        first = (config.experts, inner * (2 if config.gated else 1), hidden)
        weight = nn.Parameter(torch.randn(first) / hidden**0.5)
        self.register_parameter("gate_up_proj" if config.gated else "up_proj", weight)
        self.down_proj = nn.Parameter(torch.randn(config.experts, hidden, inner) / inner**0.5)
        self.act_fn = F.silu if config.gated else F.relu

    def forward(self, *_: Tensor) -> Tensor:
        raise NotImplementedError("dispatched by transformers")


@use_experts_implementation
class _GatedStacked(_Stacked):
    pass


@use_experts_implementation(has_gate=False)
class _PlainStacked(_Stacked):
    pass


def grouped_mm(experts: int, hidden: int, inner: int, gated: bool) -> nn.Module:
    """Build stacked parameters for transformers' grouped_mm function."""
    config = SimpleNamespace(
        experts=experts, hidden=hidden, inner=inner, gated=gated,
        _experts_implementation="grouped_mm",
    )  # fmt: skip
    return (_GatedStacked if gated else _PlainStacked)(config)


class Published(nn.Module):
    """MPOE as its paper describes it: every forward pass rebuilds every expert core by core."""

    def __init__(self, experts: int, hidden: int, inner: int, max_bond: int | None) -> None:
        super().__init__()
        self.count = experts
        self.projections = nn.ModuleList()
        for sizes in ((inner, hidden), (hidden, inner)):
            shape = tn.MPOShape.for_matrix(*sizes, sites=5)
            self.projections.append(MPOProjection(experts, shape, max_bond=max_bond))

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(states)
        for expert in range(self.count):
            tokens, choice = torch.where(index == expert)
            inner = F.relu(states[tokens] @ self._matrix(0, expert).T)
            outputs = (inner @ self._matrix(1, expert).T) * weights[tokens, choice, None]
            result = result.index_add(0, tokens, outputs)
        return result

    def _matrix(self, which: int, expert: int) -> Tensor:
        projection = self.projections[which]
        shape, cores = projection.shape, [core[expert] for core in projection.aux]
        cores.insert(projection.center_site, projection.center)
        product = cores[0]
        for core in cores[1:]:
            product = torch.tensordot(product, core, ([-1], [0]))
        legs = product.reshape([leg for pair in zip(shape.out_dims, shape.in_dims, strict=True)
                                for leg in pair])  # fmt: skip
        axes = [*range(0, 2 * shape.sites, 2), *range(1, 2 * shape.sites, 2)]
        return legs.permute(axes).reshape(shape.padded_out, shape.padded_in)


class FactorisedLayers(nn.Module):
    """Another library's factorised linear layers, one per expert and projection; none is shared."""

    def __init__(self, experts: int, hidden: int, inner: int, make: Callable) -> None:
        super().__init__()
        shape = tn.MPOShape.for_matrix(inner, hidden, sites=5)
        legs = list(shape.in_dims), list(shape.out_dims)
        self.up = nn.ModuleList(make(*legs) for _ in range(experts))
        self.down = nn.ModuleList(make(*legs[::-1]) for _ in range(experts))

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(states)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            tokens, choice = torch.where(index == expert)
            if not len(tokens):
                continue
            outputs = down(F.relu(up(states[tokens]))) * weights[tokens, choice, None]
            result = result.index_add(0, tokens, outputs)
        return result


class _TorchTT(nn.Module):
    """torchTT's layer, which works on tensorised vectors."""

    def __init__(self, in_legs: list[int], out_legs: list[int], bond: int) -> None:
        super().__init__()
        import torchtt

        ranks = [1, *tn.MPOShape(tuple(out_legs), tuple(in_legs)).bond_dims(bond), 1]
        self.layer = torchtt.nn.LinearLayerTT(in_legs, out_legs, ranks, torch.float32)
        self.legs = in_legs

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows.reshape(-1, *self.legs)).reshape(len(rows), -1)


def torchtt_layers(experts: int, hidden: int, inner: int, bond: int) -> nn.Module:
    """Build experts of torchTT's layers."""
    return FactorisedLayers(experts, hidden, inner, partial(_TorchTT, bond=bond))


def tensorly_layers(experts: int, hidden: int, inner: int, bond: int) -> nn.Module:
    """Build experts of tensorly-torch's layer in MPO form, in its faster way: by rebuilding."""

    def make(in_legs: list[int], out_legs: list[int]) -> nn.Module:
        import tltorch

        ranks = [1, *tn.MPOShape(tuple(out_legs), tuple(in_legs)).bond_dims(bond), 1]
        layer = tltorch.FactorizedLinear(
            tuple(in_legs), tuple(out_legs), bias=False, factorization="blocktt", rank=ranks,
            implementation="reconstructed",
        )  # fmt: skip
        layer.weight.normal_(0, 0.1)
        return layer

    return FactorisedLayers(experts, hidden, inner, make)


def mpo_experts(
    experts: int, hidden: int, inner: int, gated: bool, route: str | None = None, **details: object
) -> MPOExperts:
    """Build our layer; a ``route`` replaces the planned one."""
    layer = MPOExperts(experts, hidden, inner, "silu" if gated else "relu", gated=gated, **details)
    for module in layer.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return layer


def split_shapes(hidden: int, inner: int, group: int) -> dict[str, tn.MPOShape]:
    """Return the shapes of the split layout with groups of a size."""
    return {
        "up_shape": tn.MPOShape.split(inner, hidden, group, group),
        "down_shape": tn.MPOShape.split(hidden, inner, group, group),
    }


def layers(
    experts: int, hidden: int, inner: int, gated: bool
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the names and the makers of all layers of one size."""
    sizes = (experts, hidden, inner)
    yield "dense FFN", lambda: DenseFFN(hidden, inner, gated)
    yield "Switch loop", lambda: _ungated(gated, SwitchLoop(*sizes))
    yield "grouped_mm", lambda: grouped_mm(*sizes, gated)
    for bond in BONDS:
        label = "exact" if bond is None else f"bond {bond}"
        yield f"tnmoe {label}", lambda bond=bond: mpo_experts(*sizes, gated, max_bond=bond)
    for group in GROUPS:
        shapes = split_shapes(hidden, inner, group)
        yield f"tnmoe split {group}", lambda shapes=shapes: mpo_experts(*sizes, gated, **shapes)
    for bond in (None, 64):
        label = "exact" if bond is None else f"bond {bond}"
        yield f"published {label}", lambda bond=bond: _ungated(gated, Published(*sizes, bond))
    for bond in (64, 8):
        yield (
            f"torchTT bond {bond}",
            lambda bond=bond: _ungated(gated, torchtt_layers(*sizes, bond)),
        )
        yield (
            f"tensorly-torch bond {bond}",
            lambda bond=bond: _ungated(gated, tensorly_layers(*sizes, bond)),
        )


def _ungated(gated: bool, layer: nn.Module) -> nn.Module:
    """Return a layer that has no gate, or refuse a gated case."""
    if gated:
        raise Unsupported("no gate")
    return layer


def inputs(tokens: int, experts: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens and one expert for each, all equally likely, with weights of 1."""
    rng = np.random.default_rng(0)
    states = torch.tensor(rng.standard_normal((tokens, hidden), dtype=np.float32))
    index = torch.tensor(rng.integers(0, experts, (tokens, 1)))
    return states, index, torch.ones(tokens, 1)
