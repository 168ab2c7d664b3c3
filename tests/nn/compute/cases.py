"""Projections and layers that the tests of routes share, and what they must compute."""

import torch

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

SHAPES = {
    "interleaved": tn.MPOShape((2, 3, 2), (3, 2, 2)),
    "five sites": tn.MPOShape((2, 1, 3, 2, 2), (1, 2, 2, 3, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(12, 8, 4, 2),
    "two sites a side": tn.MPOShape((2, 2, 3, 1, 1), (1, 1, 2, 2, 2)),
    "centre first": tn.MPOShape((6, 2), (4, 2)),
    "centre last": tn.MPOShape((2, 6), (2, 4)),
}
SHAPES_TO_CACHE = tn.MPOShape((4, 4, 4), (4, 4, 4))


def projection(name="interleaved", experts=3, max_bond=None, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    made = MPOProjection(experts, SHAPES.get(name, name), bias=bias, max_bond=max_bond, dtype=dtype)
    if bias:
        torch.nn.init.normal_(made.bias)
    return made


def grouped(index, experts):
    return Groups.of(torch.as_tensor(index, dtype=torch.int64), experts)


def one_by_one(projection, rows, index):
    """Multiply every row by its own expert's dense matrix: the definition."""
    matrices = torch.stack(
        [projection.to_shared_mpo().expert(e).to_matrix() for e in range(projection.num_experts)]
    )
    result = torch.einsum("toi,ti->to", matrices[index], rows)
    return result if projection.bias is None else result + projection.bias[index]


def check_against_dense_matrices(made, rows, index):
    """Compare outputs and all gradients with those of the dense matrices."""
    results, index = [], torch.tensor(index)
    for way in (lambda x: made(x, grouped(index, 3)), lambda x: one_by_one(made, x, index)):
        made.zero_grad()
        leaf = rows.clone().requires_grad_()
        out = way(leaf)
        out.square().sum().backward()
        results.append(
            [out.detach(), leaf.grad, *(each.grad.clone() for each in made.parameters())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def experts(route, dtype=torch.float32, gated=True, **details):
    torch.manual_seed(0)
    details = details if "layout" in details else {"sites": 3} | details
    layer = nn.MPOExperts(4, 8, 12, "silu", gated=gated, bias=True, dtype=dtype, **details)
    for module in layer.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return layer


def routing(tokens=10, top_k=2, experts=4):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, 8, generator=generator), index, weights
