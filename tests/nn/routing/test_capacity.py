"""Slots that experts accept, against a running count."""

import pytest
import torch
from hypothesis import given, settings

from tests.nn.routing.slots import slots
from tnmoe.nn.routing.capacity import slots_within_capacity


def accepted_by_counting(index, kept, capacity, num_experts):
    """The definition: a running count of the slots of each expert."""
    accepted = torch.zeros_like(kept)
    for of_sequence, index_of, kept_of, limit in zip(
        accepted.chunk(len(capacity)),
        index.chunk(len(capacity)),
        kept.chunk(len(capacity)),
        capacity,
        strict=True,
    ):
        count = [0] * num_experts
        for choice in range(index.shape[1]):
            for token in range(len(index_of)):
                if kept_of[token, choice]:
                    count[index_of[token, choice]] += 1
                    of_sequence[token, choice] = count[index_of[token, choice]] <= limit
    return accepted


@given(slots())
@settings(max_examples=100)
def test_accepted_slots_are_those_that_a_running_count_finds(drawn):
    assert slots_within_capacity(*drawn).equal(accepted_by_counting(*drawn))


def test_no_slots_of_no_tokens_are_accepted():
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert slots_within_capacity(none, none.bool(), torch.ones(1), 4).shape == (0, 2)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_accepted_slots_have_a_shape_where_there_are_no_numbers(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "fake":
        with FakeTensorMode():
            index = torch.zeros(6, 2, dtype=torch.int64)
            found = slots_within_capacity(index, index == 0, torch.ones(3), 4)
    else:
        index = torch.zeros(6, 2, dtype=torch.int64, device="meta")
        found = slots_within_capacity(index, index == 0, torch.ones(3, device="meta"), 4)
    assert found.shape == (6, 2)
    assert found.dtype == torch.bool
