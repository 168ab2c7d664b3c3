"""Models that tnmoe itself does not make: wider ones, other shapes, other ways to share."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnmoe import hf
from tnmoe.hf.ffn import weight_of
from tnmoe.nn import MPOMoE, MPOProjection, Projection, StackedProjection, shared_parameters
from tnmoe.nn.compute.grouped import grouped_linear
from tnmoe.nn.compute.slots import Groups
from tnmoe.shapes import MPOShape

Size = tuple[int, int]


def first_sizes(model: PreTrainedModel, config: hf.MPOEConfig) -> dict[str, Size]:
    """Return the sizes (out, in) of the first converted network's matrices, by name."""
    ffn = hf.find_ffns(model, config.layers, config.every)[0]
    return {name: _size(matrix) for name, matrix in ffn.matrices.items()}


def matrix_sizes(model: PreTrainedModel, config: hf.MPOEConfig) -> set[Size]:
    """Return the sizes (out, in) of all matrices to convert."""
    ffns = hf.find_ffns(model, config.layers, config.every)
    return {_size(matrix) for ffn in ffns for matrix in ffn.matrices.values()}


def split_shapes(model: PreTrainedModel, config: hf.MPOEConfig, group: int) -> dict[Size, MPOShape]:
    """Return split shapes of a model's matrices with groups of a size, or the largest that fits."""
    return {
        (out, into): MPOShape.split(out, into, gcd(out, group), gcd(into, group))
        for out, into in matrix_sizes(model, config)
    }


def bonds_for_equal_parameters(model: PreTrainedModel, config: hf.MPOEConfig) -> hf.MPOEConfig:
    """Set the largest bonds with which experts that share nothing stay within MPOE's parameters."""
    budget = mpoe_parameters(model, config)
    low, high = 1, max(first_sizes(model, config)["up"])
    while low < high:
        bond = (low + high + 1) // 2
        size = hf.parameter_report(model, replace(config, max_bond=bond)).total.mpoe
        low, high = (bond, high) if size <= budget else (low, bond - 1)
    return replace(config, max_bond=low)


def mpoe_parameters(model: PreTrainedModel, config: hf.MPOEConfig) -> int:
    """Count the parameters of interleaved MPOE with exact bonds and the same number of experts."""
    plain = hf.MPOEConfig(
        num_experts=config.num_experts, sites=config.sites, layers=config.layers, every=config.every
    )
    return hf.parameter_report(model, plain).total.mpoe


def widened(model: PreTrainedModel, config: hf.MPOEConfig) -> PreTrainedModel:
    """Add hidden units to the networks of a dense model, up to MPOE's parameters.

    The output weights of the new units start at zero, so the model computes the same function.
    """
    ffns = hf.find_ffns(model, config.layers, config.every)
    missing = mpoe_parameters(model, config) - model.num_parameters()
    per_unit = sum(
        sum(_size(matrix)) - _width(ffn) + (matrix.bias is not None and name != "down")
        for ffn in ffns
        for name, matrix in ffn.matrices.items()
    )
    more = missing // per_unit
    for ffn in ffns:
        for name, matrix in ffn.matrices.items():
            _widen(matrix, more, outputs=name != "down")
    return model


def _width(ffn: hf.FFN) -> int:
    return _size(ffn.up)[0]


def _size(matrix: Any) -> Size:
    rows, columns = weight_of(matrix).shape
    return rows, columns


@torch.no_grad()
def _widen(matrix: Any, more: int, outputs: bool) -> None:
    """Add random rows of the old rows' deviation, or columns of zeros; in place."""
    weight = weight_of(matrix)
    if outputs:
        new = torch.randn(more, weight.shape[1]) * weight.std()
        weight = torch.cat([weight, new])
        if matrix.bias is not None:
            matrix.bias = nn.Parameter(torch.cat([matrix.bias, torch.zeros(more)]))
    else:
        weight = torch.cat([weight, torch.zeros(weight.shape[0], more)], 1)
    if isinstance(matrix, Conv1D):
        matrix.nf = len(weight)
        weight = weight.T
    else:
        matrix.out_features, matrix.in_features = weight.shape
    matrix.weight = nn.Parameter(weight.contiguous())


class LowRankProjection(Projection):
    """A projection with one matrix for all experts and a low-rank term per expert: W + Bₑ Aₑ.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
        Matrix of all experts at the start. The terms start at zero, as in LoRA
        (arXiv:2106.09685).
    num_experts, rank : int
    """

    def __init__(self, weight: Tensor, num_experts: int, rank: int) -> None:
        out_features, in_features = weight.shape
        super().__init__(num_experts, out_features, in_features)
        self.common = nn.Parameter(weight.detach().clone())
        self.into = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.out_of = nn.Parameter(torch.zeros(num_experts, out_features, rank))
        self.reset_terms()

    def weight(self) -> Tensor:
        return self.common + self.out_of @ self.into

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        inner = grouped_linear(rows, self.into, groups.offsets)
        return rows @ self.common.T + grouped_linear(inner, self.out_of, groups.offsets)

    def reset_terms(self) -> None:
        """Draw the factors on the input side with the variance of ``torch.nn.Linear``."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.into, -bound, bound)

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.common, -bound, bound)
        nn.init.zeros_(self.out_of)
        self.reset_terms()


def low_rank(model: PreTrainedModel, config: hf.MPOEConfig) -> PreTrainedModel:
    """Give a model experts of :class:`LowRankProjection` with MPOE's number of parameters."""
    budget = mpoe_parameters(model, config)
    ffns = hf.find_ffns(model, config.layers, config.every)
    sizes = [_size(matrix) for ffn in ffns for matrix in ffn.matrices.values()]
    # Make an ordinary mixture first, then keep one copy of each of its matrices.
    hf.upcycle(model, replace(config, layout="dense"))
    copies = (config.num_experts - 1) * sum(out * into for out, into in sizes)
    left = budget - (model.num_parameters() - copies)
    rank = max(1, left // (config.num_experts * sum(map(sum, sizes))))
    for layer in mixtures(model):
        for name, old in layer.experts.named_children():
            if isinstance(old, StackedProjection):
                new = LowRankProjection(old.stacked[0], config.num_experts, rank)
                new.bias = old.bias
                setattr(layer.experts, name, new)
    return model


def mixtures(model: nn.Module) -> list[MPOMoE]:
    """Return a model's mixture layers."""
    return [each for each in model.modules() if isinstance(each, MPOMoE)]


def cores_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the cores of a model's MPO projections: shared ones, and those that experts own."""
    shared = shared_parameters(model)
    common = {id(core) for core in shared}
    cores = [
        core
        for each in model.modules()
        if isinstance(each, MPOProjection)
        for core in (*each.aux, each.center)
    ]
    return {"shared": shared, "owned": [core for core in cores if id(core) not in common]}


def draw_feed_forward_anew(model: PreTrainedModel, config: hf.MPOEConfig) -> None:
    """Draw the weights of the converted networks at random; the rest stays pretrained.

    The weights have the variance of a new ``torch.nn.Linear``.
    """
    for layer in mixtures(model):
        for projection in layer.experts.children():
            if isinstance(projection, Projection):
                projection.reset_parameters()
    if mixtures(model):
        return
    for ffn in hf.find_ffns(model, config.layers, config.every):
        for matrix in ffn.matrices.values():
            nn.init.normal_(matrix.weight, std=(3 * _size(matrix)[1]) ** -0.5)
            if matrix.bias is not None:
                nn.init.zeros_(matrix.bias)


def owned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that experts own: auxiliary cores or whole matrices, and biases."""
    shared = {id(core) for core in shared_parameters(model)}
    return [
        parameter
        for layer in mixtures(model)
        for parameter in layer.experts.parameters()
        if id(parameter) not in shared and len(parameter) == layer.experts.num_experts
    ]
