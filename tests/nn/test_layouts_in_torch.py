"""Layers of every layout work under what torch does to modules and around them."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.nn.layouts import (
    LAYOUTS,
    E,
    H,
    assert_all_close,
    assert_within_rounding,
    call,
    from_linear,
    linear_loss,
    loop,
    make,
    results,
    routed,
    set_route,
)
from tnmoe import nn
from tnmoe.nn.compute import grouped

SOME = [
    "ends shared",
    "padded ends shared",
    "hidden",
    "hidden, ragged groups",
    "hidden, bonds of 1.3",
    "residual",
    "residual, three sites",
    "residual, end shared",
]
FEW = ["ends shared", "hidden, ragged groups", "residual"]


@pytest.fixture
def compiler():
    """Reset the compiler around a test: it gives up after a number of compilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def partly_routed(tokens=5, **details):
    states, index, weights = routed(tokens, **details)
    index[0, -1] = index[2] = E
    return states, index, weights


def differentiated(experts, states, index, weights):
    """Call with the gradients of a training step."""
    return results(call, experts, (states, index, weights))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("kind", "gated"),
    [
        ("hidden, ragged groups", True),
        ("residual", False),
        pytest.param("ends shared", False, marks=pytest.mark.slow),
        pytest.param("ends shared", True, marks=pytest.mark.slow),
        pytest.param("hidden, ragged groups", False, marks=pytest.mark.slow),
        pytest.param("residual", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_compiled_without_a_graph_break_a_layer_computes_the_same(kind, gated):
    experts = from_linear(kind, gated=gated)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for given in (routed(), partly_routed(tokens=6), routed(tokens=0)):
        expected = results(loop, experts, given)
        assert_all_close(results(lambda _, *given: compiled(*given), experts, given), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), expected[0])


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("kind", "gated", "autocast"),
    [("hidden, ragged groups", True, False), ("residual", False, True)],
)
def test_inductor_compiles_inference_and_training(kind, gated, autocast):
    experts = from_linear(kind, gated=gated, dtype=torch.float32)
    compiled = torch.compile(experts, fullgraph=True)
    full = copy.deepcopy(experts).double()
    for states, index, weights in (routed(), partly_routed(tokens=6)):
        expected = results(loop, full, (states, index, weights), linear_loss)
        given = states.float(), index, weights.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = results(lambda _, *given: compiled(*given), experts, given, linear_loss)
            with torch.no_grad():
                output = compiled(*given)
        dtype = torch.bfloat16 if autocast else torch.float32
        assert_within_rounding([output, *found], [expected[0], *expected], dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_transformations_give_what_ordinary_calls_give(kind, gated):
    experts, (states, index, weights) = from_linear(kind, gated=gated), partly_routed()
    expected = loop(experts, states, index, weights)

    def of_states(states):
        return experts(states, index, weights)

    torch.testing.assert_close(torch.func.vmap(of_states)(states[None])[0], expected)
    jacobian = torch.autograd.functional.jacobian(
        lambda states: loop(experts, states, index, weights), states
    )
    torch.testing.assert_close(torch.func.jacrev(of_states)(states), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(of_states)(states), jacobian)
    names = dict(experts.named_parameters())

    def loss(parameters):
        given = states, index, weights
        return torch.func.functional_call(experts, parameters, given).sin().sum()

    found = torch.func.grad(loss)(names)
    grads = torch.autograd.grad(expected.sin().sum(), list(names.values()), materialize_grads=True)
    assert_all_close(found.values(), grads)
    torch.testing.assert_close(loss(names), expected.sin().sum())
    stacked = {name: torch.stack([each, 2 * each]) for name, each in names.items()}
    both = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(both[0], expected.sin().sum())


@pytest.mark.parametrize("kind", SOME)
def test_under_transformations_numbers_that_are_not_finite_stay_with_their_expert(kind):
    experts, (states, index, weights) = from_linear(kind, gated=True), routed(experts=E - 1)
    names = dict(experts.named_parameters())

    def loss(parameters):
        given = states, index, weights
        return torch.func.functional_call(experts, parameters, given).sin().sum()

    expected = torch.func.grad(loss)(names)
    spoiled = {name: each.detach().clone() for name, each in names.items()}
    for each in spoiled.values():
        if each.ndim != 4 and len(each) == E:
            each[-1] = torch.nan
    assert_all_close(torch.func.grad(loss)(spoiled).values(), expected.values())


@pytest.mark.parametrize("way", ["with gradients", "copied", "one by one"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_forward_derivatives_are_those_of_the_loop(kind, gated, way, monkeypatch):
    if way == "one by one":
        monkeypatch.setattr(grouped, "_SELECTED", 0)
    experts, (states, index, weights) = from_linear(kind, gated=gated), routed()
    moving = {"states": states, "weights": weights}
    moving |= {f"experts.{name}": each.detach() for name, each in experts.named_parameters()}
    tangents = {name: torch.randn_like(each) for name, each in moving.items()}

    class Calling(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.experts, self.function = experts, function

        def forward(self, *given):
            return self.function(self.experts, *given)

    found = []
    for function in (call, loop):
        with torch.set_grad_enabled(way == "with gradients"), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(each, tangents[name]) for name, each in moving.items()
            }
            given = duals.pop("states"), index, duals.pop("weights")
            output = torch.func.functional_call(Calling(function), duals, given)
            found.append(forward_ad.unpack_dual(output))
    torch.testing.assert_close(found[0].primal, found[1].primal)
    torch.testing.assert_close(found[0].tangent, found[1].tangent)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_derivatives_of_first_and_second_order_agree_with_finite_differences(kind, gated):
    experts, (states, index, weights) = from_linear(kind, gated=gated), partly_routed(tokens=3)
    names = [name for name, _ in experts.named_parameters()]

    def function(states, weights, *parameters):
        parameters = dict(zip(names, parameters, strict=True))
        for name, value in parameters.items():
            holder, _, last = name.rpartition(".")
            experts.get_submodule(holder)._parameters[last] = value
        return experts(states, index, weights)

    parameters = [each.detach().clone().requires_grad_() for each in experts.parameters()]
    given = states.requires_grad_(), weights.requires_grad_(), *parameters
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("kind", SOME)
def test_checkpoints_saved_tensor_hooks_and_determinism_change_no_gradient(kind):
    experts, given = from_linear(kind, gated=True), routed()
    expected, packed = differentiated(experts, *given), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        assert_all_close(differentiated(experts, *given), expected)
    assert packed
    torch.use_deterministic_algorithms(True)
    try:
        assert_all_close(differentiated(experts, *given), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)
    for reentrant in (False, True):
        states, index, weights = (each.clone() for each in given)
        experts.zero_grad()
        states.requires_grad_()
        weights.requires_grad_()
        output = checkpoint(experts, states, index, weights, use_reentrant=reentrant)
        output.sin().sum().backward()
        leaves = states, weights, *experts.parameters()
        assert_all_close([output, *(each.grad for each in leaves)], expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_copies_pickles_state_dicts_casts_and_the_meta_device_keep_the_function(kind):
    experts, given = make(kind, gated=True, bias=True), partly_routed()
    expected = experts(*given)
    state = copy.deepcopy(experts.state_dict())
    fresh = make(kind, gated=True, bias=True, activation="gelu")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(state)
    meta = copy.deepcopy(experts).to("meta")
    assert meta.up.weight().is_meta
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(state, assign=True)
    from_meta = nn.MPOExperts(
        E, H, experts.intermediate_size, "gelu", gated=True, bias=True, device="meta",
        dtype=torch.float64, **LAYOUTS[kind],
    )  # fmt: skip
    from_meta.to_empty(device="cpu").load_state_dict(state)
    twins = (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), fresh, meta, from_meta)
    for twin in twins:
        assert_all_close([twin(*given)], [expected], rtol=0, atol=0)
    experts.train(False).train().to(torch.float64).share_memory()
    assert_all_close([experts(*given)], [expected], rtol=0, atol=0)
    states, index, weights = given
    half = copy.deepcopy(experts).half()
    output = half(states.half(), index, weights.half())
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    assert {each.dtype for each in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", SOME)
def test_on_the_meta_device_a_layer_has_sizes(kind):
    experts = make(kind, gated=True, bias=True).to("meta")
    states, index, weights = (each.to("meta") for each in routed())
    output = experts(states, index, weights)
    assert (output.device.type, output.shape) == ("meta", states.shape)


@pytest.mark.parametrize("kind", FEW)
def test_a_penalty_on_gradients_is_that_of_the_loop(kind):
    for route in (None, "joint", "rebuilt"):
        found = []
        for function in (call, loop):
            experts = set_route(from_linear(kind, gated=True), route)
            states, index, weights = partly_routed()
            leaves = [states.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
            output = function(experts, states, index, weights)
            first = torch.autograd.grad(
                output.sin().sum(), leaves, create_graph=True, materialize_grads=True
            )
            penalty = sum(each.square().sum() for each in first)
            found.append(torch.autograd.grad(penalty, leaves, materialize_grads=True))
        assert_all_close(*found)
