"""Slots are sorted by expert, dispatched, and put back into their order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnmoe.nn.compute.slots import Groups, dispatch


@given(st.lists(st.integers(0, 4), max_size=20))
def test_groups_sort_slots_stably_and_invert_the_order(index):
    slots = torch.tensor(index, dtype=torch.int64)
    groups = Groups.of(slots, 5)
    assert torch.equal(slots[groups.order], slots.sort(stable=True).values)
    assert torch.equal(slots[groups.order][groups.inverse], slots)
    assert torch.equal(groups.experts, slots[groups.order])
    assert groups.offsets.tolist() == torch.bincount(slots, minlength=5).cumsum(0).tolist()
    assert [block.stop - block.start for _, block in groups.blocks] == [
        count for count in torch.bincount(slots, minlength=5).tolist() if count
    ]


@pytest.mark.parametrize("choices", [1, 3])
def test_dispatching_tokens_is_indexing_and_differentiates_as_it(choices):
    order = torch.randperm(4 * choices, generator=torch.Generator().manual_seed(0))
    groups = Groups(order, order, len(order), order, inverse=order.argsort())
    states = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert dispatch(states, groups, choices).equal(states[order // choices])
    assert torch.autograd.gradcheck(lambda x: dispatch(x, groups, choices), (states,))
    assert torch.autograd.gradgradcheck(lambda x: dispatch(x, groups, choices), (states,))
