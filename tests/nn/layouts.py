"""Layers of every layout, and the loop over experts' dense matrices that they must agree with."""

import torch
from torch import nn as torch_nn

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.mpo_projection import MPOProjection

E, H, F = 4, 6, 12

UP, DOWN = tn.MPOShape((2, 3, 2, 1), (1, 2, 1, 3)), tn.MPOShape((1, 3, 1, 2), (2, 1, 3, 2))
LAYOUTS = {
    "interleaved": {"sites": 3},
    "interleaved, up_shape": {"up_shape": UP, "down_shape": DOWN, "max_bond": 3},
    "split": {"layout": "split", "group_size": 2},
    "split, bonds of two": {"layout": "split", "group_size": 2, "bond_ratio": 2},
    "nothing shared": {"sites": 3, "shared_sites": "none"},
    "ends shared": {"sites": 4, "shared_sites": {"up": (2, 3), "down": (0,), "gate": (0, 3)}},
    "gate and up share ends": {"sites": 4, "shared_sites": {"up": (2, 3), "gate": (2, 3)}},
    "padded ends shared": {
        "up_shape": tn.MPOShape((2, 3, 3), (1, 2, 4), F, H),
        "down_shape": tn.MPOShape((4, 2, 1), (2, 3, 3), H, F),
        "shared_sites": {"up": (1, 2), "gate": (2,), "down": (0, 2)},
    },
    "only up": {"layout": "hidden", "group_size": 4, "matrices": ["up"]},
    "hidden": {"layout": "hidden", "group_size": 4},
    "hidden, two owned sites": {"layout": "hidden", "group_size": (2, 2)},
    "hidden, ragged groups": {"layout": "hidden", "group_size": (3, 2)},
    "hidden, truncated": {"layout": "hidden", "group_size": (2, 3), "max_bond": 3},
    "hidden, bonds of 1.3": {"layout": "hidden", "group_size": 4, "bond_ratio": 1.3},
    "hidden, bonds of two": {"layout": "hidden", "group_size": 4, "bond_ratio": 2},
    "hidden, bonds of E": {"layout": "hidden", "group_size": (2, 2), "bond_ratio": E},
    "residual": {"layout": "residual", "max_bond": 2},
    "residual, three sites": {"layout": "residual", "sites": 3, "max_bond": 3},
    "residual, five sites": {"layout": "residual", "sites": 5, "max_bond": 2},
    "residual, end shared": {
        "layout": "residual", "sites": 3, "max_bond": 3, "shared_sites": {"up": (2,), "down": (0,)},
    },
}  # fmt: skip
ONCE_PER_TOKEN = ("hidden", "hidden, ragged groups", "residual", "residual, three sites")
BIASES = (False, True, "common")


def vary(experts, scale=0.3):
    """Move all parameters, so that experts differ and no bias is zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in experts.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += scale * noise.to(parameter.dtype)
    return experts


def is_owned(parameter):
    """Return whether a parameter has an expert axis: a stack of cores, of matrices or of biases."""
    return parameter.ndim != 4 and len(parameter) == E


def set_route(experts, route):
    for module in experts.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return experts


def make(kind, route=None, *, gated=False, bias=False, dtype=torch.float64, **more):
    """Make a new layer whose experts differ."""
    torch.manual_seed(0)
    more = {"activation": "gelu"} | more
    experts = nn.MPOExperts(E, H, F, gated=gated, bias=bias, dtype=dtype, **LAYOUTS[kind], **more)
    return set_route(vary(experts), route)


def make_fused(kind, route=None, *, bias=False, dtype=torch.float64, **more):
    """Make a new layer with gates and ups in one projection, whose experts differ."""
    torch.manual_seed(0)
    settings = {"bias": bias, "dtype": dtype}
    if kind == "stacked":
        wide, plain = nn.DenseExperts(E, H, 2 * F, **settings), nn.DenseExperts(E, H, F, **settings)
    else:
        settings |= LAYOUTS[kind]
        wide, plain = nn.MPOExperts(E, H, 2 * F, **settings), nn.MPOExperts(E, H, F, **settings)
    more = {"activation": "gelu"} | more
    return set_route(vary(nn.Experts(gate_up=wide.up, down=plain.down, **more)), route)


def from_linear(
    kind, *, gated=False, bias=True, dtype=torch.float64, linear=torch_nn.Linear, **more
):
    """Make a layer of linear modules, with biases of their own, whose experts differ."""
    torch.manual_seed(0)
    sizes = {"up": (H, F), "down": (F, H)} | ({"gate": (H, F)} if gated else {})
    modules = {name: linear(*size, bias=bias, dtype=dtype) for name, size in sizes.items()}
    more = {"activation": "gelu"} | more
    return vary(nn.MPOExperts.from_dense(**modules, num_experts=E, rng=0, **LAYOUTS[kind], **more))


def low_rank_projection(num_experts, out_features, in_features, **more):
    """Make matrices of low rank, of all ranks from 0 up, whose columns lie anywhere."""
    most = min(out_features, in_features)
    ranks = [expert * most // (num_experts - 1) for expert in range(num_experts)]
    made = nn.LowRankProjection(num_experts, out_features, in_features, ranks, **more)
    generator = torch.Generator().manual_seed(in_features)
    for rank, columns in zip(ranks, made.columns, strict=True):
        halves = torch.randperm(in_features, generator=generator).split([rank, in_features - rank])
        columns.copy_(torch.cat([half.sort().values for half in halves]))
    return made


def low_rank_experts(num_experts=E, hidden=H, inner=F, *, gated=False, activation="gelu", **more):
    """Make a layer of matrices of low rank."""
    sizes = {"up": (inner, hidden), "down": (hidden, inner)}
    sizes |= {"gate": (inner, hidden)} if gated else {}
    projections = {
        name: low_rank_projection(num_experts, *size, **more) for name, size in sizes.items()
    }
    return nn.Experts(**projections, activation=activation)


def routed(tokens=9, top_k=2, dtype=torch.float64, experts=E, seed=1):
    """Route tokens to all experts; weights do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64) + 0.2
    return states, index, weights.to(dtype)


def loop(experts, states, index, weights):
    """Apply the dense matrix of one expert after the other to its tokens: the definition."""
    total = torch.zeros_like(states)
    inner = [each for each in (experts.gate_up, experts.gate, experts.up) if each is not None]
    matrices = {each: (each.weight(), each.expert_biases()) for each in (*inner, experts.down)}

    def project(projection, rows, expert):
        weight, biases = matrices[projection]
        return rows @ weight[expert].T + (0 if biases is None else biases[expert])

    for expert in range(experts.num_experts):
        tokens, choice = torch.where(index == expert)
        sides = torch.cat([project(each, states[tokens], expert) for each in inner], 1)
        activated = experts.activation(*sides.split(experts.intermediate_size, 1))
        part = project(experts.down, activated, expert) * weights[tokens, choice, None]
        total = total.index_add(0, tokens, part)
    return total


def results(function, experts, given, loss=None):
    """Return the output, and the gradients of tokens, weights and all trained parameters."""
    states, index, weights = given
    states, weights = states.clone().requires_grad_(), weights.clone().requires_grad_()
    output = function(experts, states, index, weights)
    leaves = [states, weights, *(each for each in experts.parameters() if each.requires_grad)]
    loss = output.sin().sum() if loss is None else loss(output)
    return [output.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def linear_loss(output):
    """Return a loss whose gradients do not amplify the rounding of the output."""
    return (output * torch.linspace(1, 2, output.shape[1], dtype=output.dtype)).sum()


def call(experts, states, index, weights):
    return experts(states, index, weights)


def assert_all_close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_within_rounding(found, expected, dtype):
    """Compare the norms of errors with those of the numbers, in units of a dtype's last digit."""
    sizes = [torch.linalg.vector_norm(each.double()) for each in expected]
    for one, other, size in zip(found, expected, sizes, strict=True):
        error = torch.linalg.vector_norm(one.double() - other.double())
        # Terms that cancel leave the rounding errors of larger numbers.
        assert error <= 8 * torch.finfo(dtype).eps * max(size, 0.1 * max(sizes))


def assert_is_the_loop(experts, given, rtol=1e-10, atol=1e-10):
    """Compare outputs and gradients with those of the loop, and outputs without gradients."""
    expected = results(loop, experts, given)
    assert_all_close(results(call, experts, given), expected, rtol=rtol, atol=atol)
    with torch.no_grad():
        torch.testing.assert_close(experts(*given), expected[0], rtol=rtol, atol=atol)
