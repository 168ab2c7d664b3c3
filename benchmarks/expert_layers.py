"""The layers that the benchmark of experts compares; all are ``layer(states, index, weights)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from expert_peers import Published, tensorly_layers, torchtt_layers
from expert_transformers import IMPLEMENTATIONS, SwitchLoop, stacked_experts, stacked_weights
from library import Unsupported
from torch import Tensor, nn

from tnmoe.nn import MPOExperts, shared_parameters

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Sizes of tnmoe's layers: bonds (None: exact), groups of the layouts split and hidden, and bonds
# and sites of the layout residual.
BONDS = (None, 128, 64, 32, 16, 8)
GROUPS = (32, 64, 128)
RESIDUALS = {"4": (4, 2), "16": (16, 2), "64": (64, 2), "16, 4 sites": (16, 4)}

Maker = Callable[[], nn.Module]


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


def layers(experts: int, hidden: int, inner: int, gated: bool) -> Iterator[tuple[str, Maker]]:
    """Yield the names and the makers of all layers of one size."""
    yield "dense FFN", lambda: DenseFFN(hidden, inner, gated)
    yield from _ordinary(experts, hidden, inner, gated)
    yield from _ours(experts, hidden, inner, gated)
    yield from _of_peers(experts, hidden, inner, gated)


def _ordinary(experts: int, hidden: int, inner: int, gated: bool) -> Iterator[tuple[str, Maker]]:
    """Yield transformers' mixtures; its implementations have the same matrices, to save memory."""
    yield "Switch loop", lambda: _ungated(gated, SwitchLoop(experts, hidden, inner))
    weights = cache(partial(stacked_weights, experts, hidden, inner, gated))
    for name in IMPLEMENTATIONS:
        yield name, lambda name=name: stacked_experts(weights(), name)


def _ours(experts: int, hidden: int, inner: int, gated: bool) -> Iterator[tuple[str, Maker]]:
    """Yield tnmoe's layers."""
    make = partial(MPOExperts, experts, hidden, inner, "silu" if gated else "relu", gated=gated)
    for bond in BONDS:
        label = "exact" if bond is None else f"bond {bond}"
        yield f"tnmoe {label}", partial(make, max_bond=bond)
    for layout in ("split", "hidden"):
        for group in GROUPS:
            yield f"tnmoe {layout} {group}", partial(make, layout=layout, group_size=group)
    for label, (bond, sites) in RESIDUALS.items():
        yield (
            f"tnmoe residual {label}",
            partial(make, layout="residual", max_bond=bond, sites=sites),
        )


def _of_peers(experts: int, hidden: int, inner: int, gated: bool) -> Iterator[tuple[str, Maker]]:
    """Yield layers in which other code computes experts of MPO form; none has a gate."""
    sizes = (experts, hidden, inner)
    for bond in (None, 64):
        label = "exact" if bond is None else f"bond {bond}"
        yield f"published {label}", lambda bond=bond: _ungated(gated, Published(*sizes, bond))
    for bond in (64, 8):
        for library, make in (("torchTT", torchtt_layers), ("tensorly-torch", tensorly_layers)):
            yield (
                f"{library} bond {bond}",
                lambda make=make, bond=bond: _ungated(gated, make(*sizes, bond)),
            )


def _ungated(gated: bool, layer: nn.Module) -> nn.Module:
    """Return a layer that has no gate, or refuse a gated case."""
    if gated:
        raise Unsupported("no gate")
    return layer


def inputs(tokens: int, experts: int, hidden: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens, different experts for each, all equally likely, and weights that sum to 1."""
    rng = np.random.default_rng(0)
    states = torch.tensor(rng.standard_normal((tokens, hidden), dtype=np.float32))
    index = torch.tensor(rng.random((tokens, experts)).argsort(1)[:, :top_k])
    weights = torch.tensor(rng.random((tokens, top_k), dtype=np.float32) + 0.5)
    return states, index, weights / weights.sum(1, keepdim=True)


def ffn_sizes(case: dict[str, Any]) -> tuple[int, int]:
    """Return the hidden and the intermediate size of a case's network."""
    hidden, inner = case["ffn"].split("x")
    return int(hidden), int(inner)


def inputs_on(device: str, case: dict[str, Any]) -> tuple[Tensor, ...]:
    """Draw states, their experts and weights on a device."""
    drawn = inputs(case["tokens"], case["experts"], ffn_sizes(case)[0], case["top_k"])
    states, index, weights = (each.to(device) for each in drawn)
    dtype = getattr(torch, DTYPES[device])
    return states.to(dtype), index, weights.to(dtype)


def makers(case: dict[str, Any], patterns: list[str]) -> dict[str, Maker]:
    """Return the makers of a case's layers whose names match a pattern."""
    every = layers(case["experts"], *ffn_sizes(case), case["gated"])
    return {
        name: make for name, make in every if any(fnmatch(name, pattern) for pattern in patterns)
    }


def build_on(device: str, make: Maker) -> nn.Module:
    """Build a layer on a device, in the dtype that the benchmark measures there."""
    # Only for this block: with a default device, torch spends microseconds on every call.
    with torch.device(device):
        return make().to(getattr(torch, DTYPES[device]))


def weight_bytes(layer: nn.Module) -> int:
    """Count the bytes of a layer's weights."""
    return _size(layer.parameters())


def read_bytes(layer: nn.Module, index: Tensor, experts: int) -> int:
    """Count the bytes of the weights that a call needs: those of experts only if they have tokens.

    Every expert owns the same number of weights. Matrices that a layer builds from its weights,
    and keeps, are not counted.
    """
    total, common = weight_bytes(layer), _size(_common_weights(layer))
    return common + (total - common) * len(index.unique()) // experts


def _common_weights(layer: nn.Module) -> list[Tensor]:
    """Return the weights that no expert owns, each once."""
    if isinstance(layer, DenseFFN):
        return list(layer.parameters())
    bases = (module for name, module in layer.named_modules() if name.endswith(".base"))
    weights = [
        *shared_parameters(layer),
        *(weight for base in bases for weight in base.parameters()),
    ]
    return list({id(weight): weight for weight in weights}.values())


def _size(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
