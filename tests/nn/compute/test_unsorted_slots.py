"""Few slots are multiplied by their experts' cores without being sorted, with the same result."""

import pytest
import torch

from tnmoe.nn import MPOExperts
from tnmoe.nn import experts as experts_module
from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute import slot_sums
from tnmoe.nn.compute.grouped import selected_linear
from tnmoe.nn.compute.slots import UnsortedSlots

LAYOUTS = {
    "hidden": {"layout": "hidden", "group_size": 8},
    "hidden, two owned sites": {"layout": "hidden", "group_size": (2, 4)},
    "residual": {"layout": "residual", "max_bond": 4},
    "residual, interleaved": {"layout": "residual", "max_bond": 4, "sites": 4},
}


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("rows_of", ["slots", "tokens"])
@pytest.mark.parametrize(("factor", "columns"), [(1, None), (3, None), (1, 5), (3, 5)])
def test_every_row_is_multiplied_by_the_matrix_of_its_own_expert(
    factor, columns, rows_of, copied, monkeypatch
):
    monkeypatch.setattr(grouped_module, "_SELECTED", 1 << 19 if copied else 0)
    torch.manual_seed(0)
    experts = torch.tensor([2, 0, 2, 1, 1, 0])  # of two tokens
    per_token = 1 if rows_of == "slots" else 3
    size = (len(experts) // per_token, factor, 6) + ((columns,) if columns else ())
    rows, weight = torch.randn(size).double(), torch.randn(3, 4, 6).double()
    result = selected_linear(rows.flatten(0, 1), weight, UnsortedSlots(experts), factor)
    expected = [
        weight[expert] @ row
        for slot, expert in enumerate(experts)
        for row in rows[slot // per_token]
    ]
    torch.testing.assert_close(result, torch.stack(expected), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True, "common"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_slots_give_what_sorted_ones_give(layout, tokens, bias, gated, monkeypatch):
    torch.manual_seed(0)
    layer = MPOExperts(4, 16, 32, gated=gated, bias=bias, **LAYOUTS[layout]).double()
    for parameter in layer.parameters():
        parameter.normal_()
    states, index = torch.randn(tokens, 16).double(), torch.rand(tokens, 4).topk(3).indices
    weights = torch.rand(tokens, 3).double()
    calls = []
    unsorted = slot_sums.sum_unsorted
    monkeypatch.setattr(
        slot_sums, "sum_unsorted", lambda *given: calls.append(1) or unsorted(*given)
    )
    few = layer(states, index, weights)
    assert calls
    monkeypatch.setattr(slot_sums, "_FEW_SLOTS", 0)
    torch.testing.assert_close(few, layer(states, index, weights), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_may_choose_an_expert_several_times(layout, experts):
    torch.manual_seed(0)
    layer = MPOExperts(experts, 16, 32, **LAYOUTS[layout]).double()
    for parameter in layer.parameters():
        parameter.normal_()
    states, index = torch.randn(2, 16).double(), torch.tensor([[0, 0, 0, 0], [0] * 4])
    once = layer(states, index[:, :1], torch.ones(2, 1).double())
    weights = torch.full((2, 4), 0.25).double()
    torch.testing.assert_close(layer(states, index, weights), once)


@torch.no_grad()
def test_choices_without_an_expert_and_wrong_ones_are_treated_as_among_many_slots():
    layer = MPOExperts(4, 16, 32, bias=True, **LAYOUTS["hidden"])
    states, weights = torch.randn(2, 16), torch.ones(2, 1)
    output = layer(states, torch.tensor([[4], [1]]), weights)
    assert (output[0] == 0).all()
    torch.testing.assert_close(output[1:], layer(states[1:], torch.tensor([[1]]), weights[1:]))
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="experts from 0 to 3"):
            layer(states, torch.tensor([[wrong], [1]]), weights)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_slots_in_half_precision_are_as_exact_as_sorted_ones(dtype, monkeypatch):
    torch.manual_seed(0)
    layer = MPOExperts(4, 16, 32, **LAYOUTS["residual"])
    for parameter in layer.parameters():
        parameter.normal_().mul_(0.2)
    states, index = torch.randn(3, 16), torch.rand(3, 4).topk(2).indices
    weights = torch.full((3, 2), 0.5)
    exact = layer(states, index, weights)
    layer, states = layer.to(dtype), states.to(dtype)
    errors = []
    for slots in (128, 0):
        monkeypatch.setattr(slot_sums, "_FEW_SLOTS", slots)
        output = layer(states, index, weights)
        assert output.dtype == dtype
        errors.append(float((output.float() - exact).norm() / exact.norm()))
    assert errors[0] < 2 * errors[1] + torch.finfo(dtype).eps


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_slots_need_no_look_at_their_numbers(layout, monkeypatch):
    torch.manual_seed(0)
    layer = MPOExperts(4, 16, 32, bias=True, **LAYOUTS[layout])
    states, index, weights = (
        torch.randn(3, 16),
        torch.tensor([[0, 3], [4, 1], [4, 4]]),
        torch.ones(3, 2),
    )
    expected = layer(states, index, weights)
    # As on an accelerator, where a look at an index would wait for it.
    monkeypatch.setattr(experts_module, "values_are_readable", lambda tensor: False)
    output = layer(states, index, weights)
    torch.testing.assert_close(output, expected)
    assert (output[2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_experts_do_not_reach_a_choice_without_an_expert(layout):
    torch.manual_seed(0)
    layer = MPOExperts(4, 16, 32, **LAYOUTS[layout])
    states, index, weights = torch.randn(1, 16), torch.tensor([[4, 1]]), torch.ones(1, 2)
    expected = layer(states, index, weights)
    for projection in (layer.up, layer.down):
        for parameter in projection.owned_parameters:
            parameter[[0, 2, 3]] = torch.nan
    torch.testing.assert_close(layer(states, index, weights), expected)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["hidden", "residual"])
@pytest.mark.slow
def test_few_slots_compile_to_one_graph(layout):
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = MPOExperts(4, 16, 32, bias=True, **LAYOUTS[layout])
    states, index, weights = torch.randn(1, 16), torch.tensor([[0, 3]]), torch.ones(1, 2)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(states, index, weights), layer(states, index, weights))
