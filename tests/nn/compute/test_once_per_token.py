"""What acts once per token gives what a loop over the experts' dense matrices gives."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.nn.layouts import (
    BIASES,
    LAYOUTS,
    E,
    H,
    assert_all_close,
    assert_is_the_loop,
    assert_within_rounding,
    call,
    from_linear,
    is_owned,
    linear_loss,
    loop,
    make,
    results,
    routed,
    set_route,
)
from tnmoe import nn
from tnmoe.contraction.expert_routes import once_per_token_sites
from tnmoe.nn.compute import joint
from tnmoe.options import MATRICES

ROUTES = (None, "joint", "per_expert", "rebuilt")
KEEP_MODULES = [kind for kind in LAYOUTS if kind.startswith(("hidden", "residual"))]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_and_route_is_the_loop_over_dense_matrices(kind, gated, route):
    for bias in BIASES:
        assert_is_the_loop(make(kind, route, gated=gated, bias=bias), routed())


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_any_number_of_experts_per_token_is_the_loop(kind, top_k):
    assert_is_the_loop(make(kind, gated=True, bias=True), routed(top_k=top_k))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KEEP_MODULES)
def test_biases_of_a_module_count_beside_those_of_experts(kind, gated, bias):
    for common_bias in (False, True):
        experts = from_linear(kind, gated=gated, bias=bias, common_bias=common_bias)
        for route in ROUTES:
            assert_is_the_loop(set_route(experts, route), routed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_dtypes_are_the_loop_within_rounding(kind, dtype):
    for way in ("cores", "autocast"):
        if way == "autocast" and dtype == torch.float32:
            continue
        own = torch.float32 if way == "autocast" else dtype
        experts = make(kind, gated=True, bias=True, dtype=own)
        states, index, weights = routed(dtype=own)
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            found = results(call, experts, (states, index, weights), linear_loss)
        assert {each.dtype for each in found} == {own}
        exact = states.double(), index, weights.double()
        expected = results(loop, copy.deepcopy(experts).double(), exact, linear_loss)
        assert_within_rounding(found, expected, dtype)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_states_weights_and_cores_may_differ_in_dtype(kind):
    experts = from_linear(kind, gated=True, dtype=torch.float32)
    states, index, weights = routed()
    expected = results(loop, copy.deepcopy(experts).double(), (states, index, weights), linear_loss)
    for dtype, of_weights in (
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        given = states.to(dtype), index, weights.to(of_weights)
        found = results(call, experts, given, linear_loss)
        assert [each.dtype for each in found[:4]] == [dtype, dtype, of_weights, torch.float32]
        assert_within_rounding(found, expected, torch.bfloat16)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_may_be_of_another_dtype_than_the_module_they_share(kind):
    experts, given = from_linear(kind, gated=True, dtype=torch.float32), routed(dtype=torch.float32)
    exact = [each.double() if each.is_floating_point() else each for each in given]
    for name, module in experts.named_modules():
        if name.endswith(".base"):
            module.bfloat16()
    expected = results(loop, copy.deepcopy(experts).double(), exact, linear_loss)
    for route in ROUTES:
        found = results(call, set_route(experts, route), given, linear_loss)
        assert_within_rounding(found, expected, torch.bfloat16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_slots_without_an_expert_add_nothing_whatever_is_in_them(kind, gated):
    experts = from_linear(kind, gated=gated)
    states, index, weights = routed(tokens=6, top_k=3)
    index[0, 1] = index[1, :2] = index[3] = index[5] = E
    expected = results(loop, experts, (states, index, weights), linear_loss)
    states[3], weights[0, 1], weights[5] = torch.nan, torch.nan, torch.inf
    for route in ROUTES:
        found = results(call, set_route(experts, route), (states, index, weights), linear_loss)
        assert_all_close(found, expected)
        assert (found[0][[3, 5]] == 0).all()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_tokens_and_no_experts_are_a_layer_of_zeros(kind):
    experts = from_linear(kind, gated=True)
    for tokens, top_k in ((0, 2), (4, 1), (4, 2)):
        states, index, weights = routed(tokens=tokens, top_k=top_k)
        index[:] = E
        output, *grads = results(call, experts, (states, index, weights))
        assert output.shape == (tokens, H)
        assert not any(each.any() for each in (output, *grads))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_numbers_that_are_not_finite_stay_with_their_token_or_expert(kind):
    sick, gated = 2, True
    states, index, weights = routed(tokens=12)
    index[:3] = torch.tensor([0, 1])
    well = (index != sick).all(1)
    well[1] = False
    for spoil in (torch.nan, torch.inf):
        expected = results(
            call, from_linear(kind, gated=gated), (states[well], index[well], weights[well])
        )
        experts, spoiled = from_linear(kind, gated=gated), states.clone()
        owned = [number for number, each in enumerate(experts.parameters()) if is_owned(each)]
        with torch.no_grad():
            spoiled[1] = spoil
            for number in owned:
                [*experts.parameters()][number][sick] = spoil
        output, of_states, of_weights, *of_cores = results(
            call,
            experts,
            (spoiled, index, weights),
            lambda output: output[well].sin().sum(),
        )
        assert not output[~well].isfinite().any(1).all()
        torch.testing.assert_close(output[well], expected[0])
        torch.testing.assert_close(of_states[well], expected[1])
        torch.testing.assert_close(of_weights[well], expected[2])
        others = [expert for expert in range(E) if expert != sick]
        for number in owned:
            mine = [e for e in others if e not in (0, 1)]
            torch.testing.assert_close(of_cores[number][mine], expected[3 + number][mine])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_expert_that_no_token_visits_changes_nothing(kind):
    for route in ROUTES:
        states, index, weights = routed(experts=E - 1)
        experts = set_route(from_linear(kind, gated=True), route)
        expected = results(call, experts, (states, index, weights))
        with torch.no_grad():
            for parameter in experts.parameters():
                if is_owned(parameter):
                    parameter[-1] = torch.nan
        assert_all_close(results(call, experts, (states, index, weights)), expected)


@st.composite
def projections(draw):
    """Shapes of up and down for one layer, and sites that experts share in each."""
    size = draw(st.integers(2, 4))
    legs = st.lists(st.integers(1, 3), min_size=size, max_size=size)
    outs, ins = tuple(draw(legs)), tuple(draw(legs))
    up, down = tn.MPOShape(outs, ins), tn.MPOShape(ins, outs)
    shared = st.sets(st.integers(0, size - 1), max_size=size - 1)
    return {name: (up if name != "down" else down, draw(shared)) for name in MATRICES}


@given(projections(), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans())
def test_shared_cores_at_the_inner_ends_act_once_per_token(given, tokens, top_k, gated, grad):
    made = {
        name: nn.MPOProjection(3, shape, max_bond=2, shared_sites=shared, dtype=torch.float64)
        for name, (shape, shared) in given.items()
        if gated or name != "gate"
    }
    experts = set_route(nn.Experts(**made, activation="gelu"), "joint")
    states = torch.randn(tokens, experts.hidden_size, dtype=torch.float64)
    _, index, weights = routed(tokens, top_k, experts=3)
    acted = {}

    def multiply(state, matrix, groups, factor):
        result = plain(state, matrix, groups, factor)
        # Slots that are not sorted take the rows of their tokens. So the results count.
        acted[matrix.data_ptr()] = acted.get(matrix.data_ptr(), 0) + len(result) // factor
        return result

    plain = joint._multiply
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(joint, "_multiply", multiply)
        output = experts(states, index, weights)
    torch.testing.assert_close(output, loop(experts, states, index, weights))
    for name, projection in made.items():
        once = once_per_token_sites(projection.shape.sites, projection.shared_sites, name)
        for site in range(projection.shape.sites):
            vectors = tokens if site in once else tokens * top_k
            assert acted[projection.core_at(site).data_ptr()] == vectors, (name, site)


@pytest.mark.parametrize("layout", ["hidden", "residual", "joint"])
def test_what_gate_and_up_have_in_common_acts_once_for_both(layout, monkeypatch):
    rows = []
    if layout == "joint":
        experts = make("gate and up share ends", "joint", gated=True)
        for site in (2, 3):
            experts.gate.set_core(site, experts.up.core_at(site))
        plain = joint._multiply
        monkeypatch.setattr(
            joint, "_multiply", lambda *a: rows.append(a[1].data_ptr()) or plain(*a)
        )
        experts(*routed())
        for site in (2, 3):
            assert rows.count(experts.up.core_at(site).data_ptr()) == 1
    else:
        experts = make(layout, gated=True, bias=True)
        experts.gate.base = experts.up.base
        experts.up.base.register_forward_hook(lambda module, given, _: rows.append(len(given[0])))
        states, index, weights = routed()
        experts(states, index, weights)
        assert rows == [len(states)]
    assert_is_the_loop(experts, routed())
