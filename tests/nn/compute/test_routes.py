"""Every route computes what the experts' dense matrices do, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tnmoe as tn
from tests.nn.compute.cases import SHAPES, experts, grouped, one_by_one, projection, routing

ROUTES = ("rebuilt", "joint", "per_expert", "cached")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.sampled_from((None, 1, 2)), st.booleans())
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_route_gives_every_row_its_own_experts_product(route, name, index, max_bond, bias):
    made = projection(name, max_bond=max_bond, bias=bias)
    made.route = route
    index = torch.tensor(sorted(index), dtype=torch.int64)
    rows = torch.randn(len(index), made.in_features, dtype=torch.float64)
    with torch.no_grad():
        result = made(rows, grouped(index, 3))
        torch.testing.assert_close(result, one_by_one(made, rows, index))


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("index", [[0, 0, 2, 2, 2], [1, 1, 1, 1, 1]])
def test_gradients_of_a_route_agree_with_finite_differences(route, name, index):
    made = projection(name, max_bond=2, bias=True)
    made.route = route
    rows = torch.randn(5, made.in_features, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters()]

    def function(rows, *cores):
        cores = dict(zip(names, cores, strict=True))
        for core, value in cores.items():
            holder, _, last = core.rpartition(".")
            module = made.get_submodule(holder)
            module._parameters[last] = value
        return made(rows, grouped(index, 3))

    cores = [core.detach().clone().requires_grad_() for core in made.parameters()]
    assert torch.autograd.gradcheck(function, (rows, *cores))


@pytest.mark.parametrize("route", ["rebuilt", "joint"])
def test_gradients_are_those_of_the_dense_matrices_where_only_some_are_needed(route):
    for frozen in ("center", "aux_0", "rows"):
        gradients = []
        for way in (route, None):
            made = projection(dtype=torch.float32)
            made.route = route
            rows = torch.randn(
                4, made.in_features, generator=torch.Generator().manual_seed(1)
            ).requires_grad_(frozen != "rows")
            for name, core in made.named_parameters():
                core.requires_grad_(name != frozen)
            index = torch.tensor([0, 1, 1, 2])
            result = made(rows, grouped(index, 3)) if way else one_by_one(made, rows, index)
            result.square().sum().backward()
            gradients.append([each.grad for each in (rows, *made.parameters())])
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


def test_auxiliary_cores_are_found_under_a_parametrization():
    made = projection()
    torch.nn.utils.parametrize.register_parametrization(made, "aux_0", torch.nn.Tanh())
    made.route = "joint"
    rows, index = torch.randn(2, made.in_features, dtype=torch.float64), torch.tensor([0, 2])
    torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision_and_keeps_gradients_in_that_of_the_cores(route, dtype):
    states, index, weights = routing()
    layer = experts(route)
    expected = layer(states, index, weights)
    with torch.autocast("cpu", dtype):
        result = layer(states, index, weights)
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    result.square().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in layer.parameters())
    assert all(torch.isfinite(each.grad).all() for each in layer.parameters())


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
def test_activation_checkpointing_gives_the_same_gradients(route):
    states, index, weights = routing()
    gradients = []
    for through in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        layer = experts(route)
        inputs = states.clone().requires_grad_()
        through(layer, inputs, index, weights).square().sum().backward()
        gradients.append([inputs.grad, *(each.grad for each in layer.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_function_transforms_see_the_layer_they_transform():
    layer = experts(None, torch.float64)
    states, index, weights = (
        each.double() if each.is_floating_point() else each for each in routing()
    )
    parameters = dict(layer.named_parameters())

    def loss(parameters, states, index, weights):
        out = torch.func.functional_call(layer, parameters, (states, index, weights))
        return out.square().sum()

    found = torch.func.grad(loss)(parameters, states, index, weights)
    loss(parameters, states, index, weights).backward()
    for name, each in layer.named_parameters():
        torch.testing.assert_close(found[name], each.grad)
    per_batch = torch.func.vmap(layer)(
        states.view(2, 5, 8), index.view(2, 5, 2), weights.view(2, 5, 2)
    )
    torch.testing.assert_close(per_batch.view(10, 8), layer(states, index, weights))


def test_function_transforms_take_states_of_another_dtype():
    layer = experts(None, torch.float32)
    states, index, weights = routing()
    states = states.double()
    found = torch.func.vmap(layer)(states.view(2, 5, 8), index.view(2, 5, 2), weights.view(2, 5, 2))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.view(10, 8), layer(states, index, weights))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("route", "layout"),
    [("rebuilt", "interleaved"), ("joint", "split"), (None, "interleaved"), (None, "split")],
)
@pytest.mark.slow
def test_compiled_without_a_graph_break_it_computes_the_same(route, layout):
    layer = experts(route, layout=layout)
    states, index, weights = routing()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        out = function(states, index, weights)
        out.square().sum().backward()
        results.append([out.detach(), *(each.grad.clone() for each in layer.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(states, index, weights), results[0][0])
        more = routing(tokens=13)
        torch.testing.assert_close(compiled(*more), layer(*more))


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
def test_deterministic_mode_is_respected(route):
    states, index, weights = routing()
    layer = experts(route)
    torch.use_deterministic_algorithms(True)
    try:
        layer(states, index, weights).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("site", [0, 1])
def test_pruned_cores_are_found_at_their_sites(site):
    made = projection()
    prune.l1_unstructured(made, f"aux_{site}", amount=0.5)
    assert not made.aux[site].all()
    rows, index = torch.randn(3, made.in_features, dtype=torch.float64), torch.tensor([0, 1, 2])
    made.route = "rebuilt"
    torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


def test_an_unknown_route_is_named():
    with pytest.raises(tn.InputError, match=r"route must be one of .*, got 'fast'"):
        experts("fast")(*routing())
