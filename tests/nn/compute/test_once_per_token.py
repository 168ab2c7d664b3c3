"""What acts once per token gives what a loop over the experts' dense matrices gives."""

import copy

import pytest
import torch

from tests.nn.layouts import (
    BIASES,
    E,
    H,
    LAYOUTS,
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
