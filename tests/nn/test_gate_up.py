"""Experts whose gates and ups are one projection compute what experts with two of them compute."""

import copy
import pickle

import pytest
import torch

from tests.nn.layouts import (
    BIASES,
    E,
    F,
    H,
    assert_all_close,
    assert_is_the_loop,
    assert_within_rounding,
    call,
    linear_loss,
    loop,
    make,
    make_fused,
    results,
    routed,
    set_route,
)
from tnmoe import InputError, MPOShape, contraction_plan, decompose_shared, nn
from tnmoe.nn.compute import slot_chunks, slot_sums
from tnmoe.nn.structure import ProjectionStructure

ROUTES = (None, "joint", "rebuilt", "per_expert")
KINDS = (
    "stacked",
    "nothing shared",
    "interleaved",
    "ends shared",
    "hidden",
    "hidden, ragged groups",
    "hidden, bonds of two",
    "residual",
    "residual, three sites",
)
FEW = ("stacked", "nothing shared", "hidden", "residual")
# Layouts whose shared part acts once per token, for gates and ups together.
ONCE_PER_TOKEN = ("hidden", "hidden, ragged groups", "residual", "residual, three sites")


def partly_routed(tokens=5, **details):
    states, index, weights = routed(tokens, **details)
    index[0, -1] = index[2] = E
    return states, index, weights


def apart(experts):
    """Return experts with the same matrices, gates and ups in projections of their own."""
    biases = {f"{name}_bias": bias for name, bias in experts.biases().items()}
    settings = {"activation": experts.activation, "dropout": experts.dropout}
    matrices = experts.matrices()
    return nn.MPOExperts.from_shared(**matrices, **biases, **settings).train(experts.training)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_loop_on_every_route(kind, bias):
    experts = make_fused(kind, bias=bias)
    for route in ROUTES:
        assert_is_the_loop(set_route(experts, route), partly_routed())
    for tokens in (0, 1):
        assert_is_the_loop(set_route(experts, None), routed(tokens=tokens))
    with torch.no_grad():
        cached = set_route(experts, "cached")(*routed())
        torch.testing.assert_close(cached, loop(experts, *routed()))


@pytest.mark.parametrize("activation", ["silu", "swiglu", "reglu", "clamped_swiglu", torch.tanh])
@pytest.mark.parametrize("kind", FEW)
def test_the_first_half_of_the_rows_is_the_gate_as_of_two_projections(kind, activation):
    experts = make_fused(kind, bias=True, activation=activation)
    both = apart(experts)
    assert both.gate_up is None
    assert experts.is_gated
    assert both.is_gated
    torch.testing.assert_close(both.gate.weight(), experts.gate_up.weight()[:, :F])
    torch.testing.assert_close(both.up.bias, experts.gate_up.expert_biases()[:, F:])
    for given in (routed(), routed(tokens=40, top_k=3)):
        torch.testing.assert_close(experts(*given), both(*given))


def test_an_activation_may_work_in_place():
    given = routed()
    found = [
        results(call, make_fused("stacked", activation=torch.nn.ReLU(inplace)), given)
        for inplace in (False, True)
    ]
    assert_all_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_loop(kind, is_kept, monkeypatch):
    monkeypatch.setattr(slot_sums, "_LAST_LEVEL_CACHE", -1)
    monkeypatch.setattr(slot_sums, "_FEW_SLOTS", -1)
    monkeypatch.setattr(slot_chunks, "_KEPT", 1 << 62 if is_kept else -1)
    monkeypatch.setattr(slot_chunks, "_CHUNK", 1)
    assert_is_the_loop(make_fused(kind, bias=True), routed(tokens=70, top_k=3))


@pytest.mark.parametrize("kind", ["stacked", "nothing shared"])
def test_experts_take_turns_without_gradients(kind, monkeypatch):
    monkeypatch.setattr(slot_sums, "_LAST_LEVEL_CACHE", -1)
    pieces = []

    def counted(*given):
        pieces.append(given)
        return slot_chunks.sum_in_chunks(*given)

    monkeypatch.setattr(slot_sums, "sum_in_chunks", counted)
    experts, given = make_fused(kind), routed(tokens=70)
    experts.eval()
    with torch.no_grad():
        torch.testing.assert_close(experts(*given), loop(experts, *given))
        assert pieces
        set_route(experts, "joint")(*given)
    assert len(pieces) == (2 if kind == "stacked" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_under_transformations_the_layer_is_the_loop(kind):
    experts, (states, index, weights) = make_fused(kind, bias=True), partly_routed()
    expected = loop(experts, states, index, weights)
    parameters = dict(experts.named_parameters())

    def function(parameters, states):
        return torch.func.functional_call(experts, parameters, (states, index, weights))

    torch.testing.assert_close(
        torch.func.vmap(function, (None, 0))(parameters, states[None])[0], expected
    )
    found = torch.func.grad(lambda each: function(each, states).sin().sum())(parameters)
    leaves = list(parameters.values())
    assert_all_close(found.values(), torch.autograd.grad(expected.sin().sum(), leaves))
    jacobian = torch.func.jacfwd(function, argnums=1)(parameters, states)
    dense = torch.autograd.functional.jacobian(
        lambda each: loop(experts, each, index, weights), states
    )
    torch.testing.assert_close(jacobian, dense)


@pytest.mark.parametrize("kind", FEW)
def test_derivatives_of_first_and_second_order_agree_with_finite_differences(kind):
    experts, (states, index, weights) = make_fused(kind, bias=True), partly_routed(tokens=3)
    names = [name for name, _ in experts.named_parameters()]

    def function(states, weights, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, given, (states, index, weights))

    parameters = [each.detach().clone().requires_grad_() for each in experts.parameters()]
    given = states.requires_grad_(), weights.requires_grad_(), *parameters
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("stacked", marks=pytest.mark.slow),
        "hidden",
        pytest.param("residual", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_compiled_without_a_graph_break_a_layer_computes_the_same(kind):
    torch.compiler.reset()
    experts = make_fused(kind, bias=True)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for given in (routed(), partly_routed(tokens=6)):
        expected = results(loop, experts, given)
        assert_all_close(results(lambda _, *given: compiled(*given), experts, given), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), expected[0])
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FEW)
def test_half_precision_is_within_rounding(kind, dtype):
    for way in ("autocast", "cores"):
        own = torch.float32 if way == "autocast" else dtype
        experts, given = make_fused(kind, bias=True, dtype=own), routed(dtype=own)
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            found = results(call, experts, given, linear_loss)
        exact = given[0].double(), given[1], given[2].double()
        expected = results(loop, copy.deepcopy(experts).double(), exact, linear_loss)
        assert_within_rounding(found, expected, dtype)


@pytest.mark.parametrize("kind", FEW)
def test_dropout_drops_activated_values_in_training_alone(kind):
    experts, given = make_fused(kind, dropout=1.0), routed()
    assert not experts(*given).any()
    experts.eval()
    torch.testing.assert_close(experts(*given), loop(experts, *given))


@pytest.mark.parametrize("kind", ONCE_PER_TOKEN)
def test_what_experts_share_acts_once_per_token_for_gates_and_ups_together(kind):
    plan = make_fused(kind).plan(tokens=8, top_k=2)
    names = [(step.matrix, step.per) for step in plan.steps]
    assert [per for name, per in names if name == "gate_up"][:2] == ["token", "slot"]
    assert {name for name, _ in names} == {"gate_up", "down"}
    assert "gate_up" in str(plan)


def test_a_plan_counts_the_operations_of_whole_matrices():
    (into, out) = make_fused("stacked").plan(tokens=8, top_k=2).steps
    assert (into.matrix, into.flops) == ("gate_up", 16 * 2 * (2 * F) * H)
    assert (out.matrix, out.flops) == ("down", 16 * 2 * F * H)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_keep_the_function(kind):
    experts, given = make_fused(kind, bias=True), partly_routed()
    state = experts.state_dict()
    assert {name.partition(".")[0] for name in state} == {"gate_up", "down"}
    fresh = make_fused(kind, bias=True)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(state)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), fresh):
        assert_all_close([twin(*given)], [experts(*given)], rtol=0, atol=0)


@pytest.mark.parametrize("kind", FEW)
def test_experts_built_from_the_structures_take_the_numbers(kind):
    experts, given = make_fused(kind, bias=True), routed()
    structures = {
        name: ProjectionStructure.of(each) for name, each in experts.projections().items()
    }
    assert list(structures) == ["gate_up", "down"]
    other = nn.MPOExperts.from_structures(structures, E, activation="gelu", dtype=torch.float64)
    assert other.gate_up is not None
    other.load_state_dict(experts.state_dict())
    torch.testing.assert_close(other(*given), experts(*given), rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_matrices_and_biases_are_those_of_projections_of_their_own(gated):
    experts = make("hidden", gated=gated, bias="common")
    names = ["gate", "up", "down"] if gated else ["up", "down"]
    assert list(experts.projections()) == list(experts.matrices()) == names
    for name, projection in experts.projections().items():
        assert projection is getattr(experts, name)
        torch.testing.assert_close(experts.matrices()[name], projection.weight())
        torch.testing.assert_close(experts.biases()[name], projection.expert_biases())
    assert make("hidden", gated=gated).biases() == {}


def test_given_matrices_become_one_projection_with_its_bias():
    both, down, bias = torch.randn(E, 2 * F, H), torch.randn(E, H, F), torch.randn(E, 2 * F)
    shared = decompose_shared(both, residual=True, max_bond=3)
    experts = nn.MPOExperts.from_shared(gate_up=shared, down=down, gate_up_bias=bias)
    whole = nn.MPOExperts.from_shared(
        gate=shared.to_matrices()[:, :F], up=shared.to_matrices()[:, F:], down=down,
        gate_bias=bias[:, :F], up_bias=bias[:, F:],
    )  # fmt: skip
    given = routed(dtype=torch.float32)
    torch.testing.assert_close(experts(*given), whole(*given), rtol=1e-4, atol=1e-4)


def test_a_given_projection_is_used_as_it_stands_and_keeps_its_bias():
    gate_up, down = (
        nn.StackedProjection(E, 2 * F, H, bias=True),
        nn.MPOProjection(E, MPOShape((H, 1), (1, F)), max_bond=2, shared_sites="none"),
    )
    own = gate_up.bias
    experts = nn.MPOExperts.from_shared(gate_up=gate_up, down=down, down_bias=torch.ones(E, H))
    assert experts.gate_up is gate_up
    assert experts.down is down
    assert experts.gate_up.bias is own
    assert torch.equal(experts.down.bias, torch.ones(E, H))


def test_a_bias_without_its_matrix_is_refused():
    both, down = torch.randn(E, 2 * F, H), torch.randn(E, H, F)
    with pytest.raises(InputError, match="up_bias is given without up"):
        nn.MPOExperts.from_shared(gate_up=both, down=down, up_bias=torch.zeros(E, F))


def test_a_route_is_planned_for_gate_up_as_for_up():
    shape = MPOShape.split(768, 256, 64, ())
    settings = {"batch": 64, "experts": 8, "top_k": 2, "center_site": 1}
    plans = [contraction_plan(shape, matrix=name, **settings) for name in ("gate_up", "up", None)]
    assert plans[0].seconds == plans[1].seconds != plans[2].seconds


def test_layers_share_the_cores_of_their_joint_projections():
    layers = [make_fused("hidden") for _ in range(2)]
    nn.tie_layers(layers)
    first, second = (layer.gate_up for layer in layers)
    assert first.base.weight is second.base.weight
    with pytest.raises(InputError, match="up is not an MPO in one of the layers: None"):
        nn.tie_layers([layers[0], make("hidden", gated=True)])


def stacked(rows, columns, experts=2):
    return nn.StackedProjection(experts, rows, columns)


UP, GATE, DOWN, BOTH = stacked(4, 3), stacked(4, 3), stacked(3, 4), stacked(8, 3)


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        ({}, "got none"),
        ({"gate_up": BOTH}, "got gate_up"),
        ({"down": DOWN}, "got down"),
        ({"gate": GATE, "down": DOWN}, "got down, gate"),
        ({"gate_up": BOTH, "up": UP, "down": DOWN}, "got down, gate_up, up"),
        ({"gate_up": BOTH, "gate": GATE, "down": DOWN}, "or gate_up and down; got"),
        ({"gate_up": stacked(7, 3), "down": DOWN}, r"gate_up .* must be \(2, 8, 3\)"),
        ({"gate_up": UP, "down": DOWN}, r"does not fit down .* must be \(2, 8, 3\)"),
        ({"gate_up": stacked(8, 2), "down": DOWN}, r"must be \(2, 8, 3\)"),
        ({"gate_up": stacked(8, 3, experts=3), "down": DOWN}, r"must be \(2, 8, 3\)"),
        ({"up": BOTH, "down": DOWN}, r"up .* must be \(2, 4, 3\)"),
    ],
)
def test_projections_that_make_no_experts_are_refused(projections, message):
    with pytest.raises(InputError, match=message):
        nn.Experts(**projections)
