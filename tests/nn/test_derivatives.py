"""Second derivatives, forward-mode derivatives, and experts under ``torch.func``."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradgradcheck

import tnmoe as tn
from tests.nn.layouts import low_rank_experts
from tnmoe import nn
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer, per_row
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

SHAPES = {
    "interleaved": tn.MPOShape((2, 3, 2), (3, 2, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(12, 8, 4, 2),
    "two sites a side": tn.MPOShape((2, 1, 2, 1, 2), (1, 2, 2, 2, 1)),
    "centre first": tn.MPOShape((6, 2), (4, 2)),
    "centre last": tn.MPOShape((2, 6), (2, 4)),
}
ROUTES = ("rebuilt", "joint", "per_expert", None)
KINDS = {
    "dense experts": lambda **more: nn.DenseExperts(4, 6, 8, **more),
    "interleaved": lambda **more: nn.MPOExperts(4, 6, 8, sites=3, max_bond=2, **more),
    "split": lambda **more: nn.MPOExperts(4, 6, 8, layout="split", **more),
    "nothing shared": lambda **more: nn.MPOExperts(4, 6, 8, sites=2, shared_sites="none", **more),
    "low rank": lambda **more: low_rank_experts(4, 6, 8, **more),
    "only up": lambda **more: nn.MPOExperts(4, 6, 8, sites=2, matrices=["up"], **more),
}


def make_projection(name, shared_sites="center", bias=True):
    torch.manual_seed(0)
    made = MPOProjection(
        3, SHAPES[name], bias=bias, max_bond=2, shared_sites=shared_sites, dtype=torch.float64
    )
    if bias:
        torch.nn.init.normal_(made.bias)
    return made


def make_experts(kind, route=None, gated=False, bias=True):
    torch.manual_seed(0)
    experts = KINDS[kind](gated=gated, bias=bias, activation="gelu").double()
    for module in experts.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return experts


def routed(tokens=5, experts=4, top_k=2):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    weights, index = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).topk(
        top_k
    )
    index[0, -1] = experts  # a slot without an expert
    return states, index, weights


def loop(experts, states, index, weights):
    """Apply torch's own operators to one token and choice after the other: the definition."""
    up, down, gate = experts.up, experts.down, experts.gate

    def project(projection, expert, state):
        result = projection.weight()[expert] @ state
        if projection.bias is None:
            return result
        return result + projection.bias[min(expert, len(projection.bias) - 1)]

    rows = []
    for state, chosen, shares in zip(states, index.tolist(), weights, strict=True):
        total = torch.zeros_like(state)
        for expert, share in zip(chosen, shares, strict=True):
            if expert < experts.num_experts:
                sides = (up,) if gate is None else (gate, up)
                inner = experts.activation(*(project(side, expert, state) for side in sides))
                total = total + share * project(down, expert, inner)
        rows.append(total)
    return torch.stack(rows)


class Calling(torch.nn.Module):
    """Return the experts as a function of their parameters."""

    def __init__(self, experts, function):
        super().__init__()
        self.experts, self.function = experts, function

    def forward(self, *given):
        return self.function(self.experts, *given)


@pytest.mark.parametrize("shared", ["center", "none", (0,)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SHAPES)
def test_second_derivatives_of_a_route_agree_with_finite_differences(route, name, shared):
    made = make_projection(name, shared)
    made.route = route
    rows = torch.randn(4, made.in_features, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters()]
    groups = Groups.of(torch.tensor([0, 0, 2, 2]), 3)

    def function(rows, *cores):
        return torch.func.functional_call(
            made, dict(zip(names, cores, strict=True)), (rows, groups)
        )

    cores = [core.detach().clone().requires_grad_() for core in made.parameters()]
    assert gradgradcheck(function, (rows, *cores), fast_mode=True)


@pytest.mark.parametrize("columns", [(), (2,)])
def test_operators_on_groups_have_derivatives_of_every_order(columns):
    groups = Groups.of(torch.tensor([0, 0, 2, 2, 2]), 3)
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    for function, inputs in (
        (lambda *x: grouped_linear(*x, groups.offsets), (draw(5, 4, *columns), draw(3, 2, 4))),
        (
            lambda *x: grouped_outer(*x, groups.offsets),
            (draw(5, 2, *columns), draw(5, 4, *columns)),
        ),
        (lambda x: per_row(x, groups), (draw(3, 4),)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty_has_the_gradients_of_the_loop_over_experts(kind, route, gated):
    experts, (states, index, weights) = make_experts(kind, route, gated), routed()
    results = []
    for forward in (experts, lambda *given: loop(experts, *given)):
        given, shares = (each.clone().requires_grad_() for each in (states, weights))
        output = forward(given, index, shares)
        inner = [given, shares, *experts.parameters()]
        first = torch.autograd.grad(output.sin().sum(), inner, create_graph=True)
        penalty = sum(each.square().sum() for each in first)
        results.append(torch.autograd.grad(penalty, inner))
    for mine, own in zip(*results, strict=True):
        torch.testing.assert_close(mine, own)


def test_derivatives_of_third_order_are_those_of_the_dense_matrices():
    made = make_projection("two sites a side")
    groups, results = Groups.of(torch.tensor([0, 2, 2]), 3), []
    rows = torch.randn(3, made.in_features, dtype=torch.float64, requires_grad=True)
    for route in ("rebuilt", "loop"):
        made.route = "rebuilt"
        if route == "rebuilt":
            value = made(rows, groups)
        else:
            value = torch.einsum("toi,ti->to", made.weight()[groups.experts], rows)
            value = value + made.bias[groups.experts]
        variables = [rows, *made.parameters()]
        for _ in range(3):
            value = value.square().sum()
            grads = torch.autograd.grad(value, variables, create_graph=True)
            value = torch.cat([grad.flatten() for grad in grads])
        results.append(value)
    torch.testing.assert_close(*results)


def test_a_layer_trains_on_a_gradient_penalty():
    torch.manual_seed(0)
    experts = nn.MPOExperts(4, 16, 32, sites=3, bias=True, activation="gelu")
    layer = nn.MPOMoE(nn.TopKRouter(16, 4, top_k=2), experts)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    states, sizes = torch.randn(64, 16), []
    for _ in range(20):
        inputs = states.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(inputs).sum(), inputs, create_graph=True)
        optimizer.zero_grad()
        slope.square().mean().backward()
        optimizer.step()
        sizes.append(slope.square().mean().item())
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_derivatives_are_those_of_the_loop_over_experts(kind, route, gated, graded):
    experts, (states, index, weights) = make_experts(kind, route, gated), routed()
    torch.manual_seed(2)
    moving = {"states": states, "weights": weights}
    moving |= {f"experts.{name}": each.detach() for name, each in experts.named_parameters()}
    tangents = {name: torch.randn_like(each) for name, each in moving.items()}

    def derivative(function):
        with torch.set_grad_enabled(graded), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(each, tangents[name]) for name, each in moving.items()
            }
            given = duals.pop("states"), index, duals.pop("weights")
            output = torch.func.functional_call(Calling(experts, function), duals, given)
            return forward_ad.unpack_dual(output)

    mine, own = derivative(lambda experts, *given: experts(*given)), derivative(loop)
    torch.testing.assert_close(mine.primal, own.primal)
    torch.testing.assert_close(mine.tangent, own.tangent)


@pytest.mark.parametrize("route", ["joint", "per_expert", "rebuilt"])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_mode_over_reverse_mode_is_reverse_mode_twice(name, route):
    made, groups = make_projection(name), Groups.of(torch.tensor([0, 2, 2]), 3)
    made.route = route
    rows = torch.randn(3, made.in_features, dtype=torch.float64)
    direction = torch.randn_like(rows)

    def slope(given):
        given = given.requires_grad_() if given.is_leaf else given
        output = made(given, groups).sin().sum()
        return torch.autograd.grad(output, given, create_graph=True)[0]

    leaf = rows.clone().requires_grad_()
    expected = torch.autograd.grad((slope(leaf) * direction).sum(), leaf)[0]
    with forward_ad.dual_level():
        leaf = rows.clone().requires_grad_()
        tangent = forward_ad.unpack_dual(slope(forward_ad.make_dual(leaf, direction))).tangent
    torch.testing.assert_close(tangent, expected)


def test_kept_matrices_have_no_derivatives_and_say_so():
    made, groups = make_projection("interleaved"), Groups.of(torch.tensor([0, 2]), 3)
    made.route = "cached"
    rows = torch.randn(2, made.in_features, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, rows)
        with pytest.raises(tn.InputError, match="route='cached' has no derivatives"):
            made(dual, groups)
        made.route = None
        tangent = forward_ad.unpack_dual(made(dual, groups)).tangent
    torch.testing.assert_close(tangent, made(rows, groups) - made.bias[groups.experts])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformations_give_what_ordinary_calls_give(kind, gated):
    experts, (states, index, weights) = make_experts(kind, gated=gated), routed()
    tangent = torch.randn_like(states)
    expected = loop(experts, states, index, weights)

    def call(states):
        return experts(states, index, weights)

    torch.testing.assert_close(torch.func.vmap(call)(states[None])[0], expected)
    output, forward = torch.func.jvp(call, (states,), (tangent,))
    torch.testing.assert_close(output, expected)
    leaf = states.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda given: loop(experts, given, index, weights), leaf
    )
    torch.testing.assert_close(forward, torch.einsum("thsg,sg->th", jacobian, tangent))
    torch.testing.assert_close(torch.func.jacrev(call)(states), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(call)(states), jacobian)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_routers_forward_derivatives_are_its_gradients(
    top_k, score_function, capacity_factor, graded
):
    torch.manual_seed(0)
    router = nn.TopKRouter(
        6, 4, top_k=top_k, score_function=score_function, capacity_factor=capacity_factor
    )
    layer = nn.MPOMoE(router, make_experts("interleaved").float()).double()
    states = torch.randn(5, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, states)
    layer.requires_grad_(graded)
    torch.testing.assert_close(torch.func.jacfwd(layer)(states), jacobian)
    with torch.set_grad_enabled(graded), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(states, states))).tangent
    torch.testing.assert_close(tangent, torch.einsum("thsg,sg->th", jacobian, states))
