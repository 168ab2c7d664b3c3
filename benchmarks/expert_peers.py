"""Experts of MPO form as a paper or another library computes them: no tnmoe kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnmoe as tn
from tnmoe.nn import MPOProjection


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
