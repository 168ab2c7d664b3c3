"""Choices of experts are counted and ranked in memory that no table of all choices needs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tnmoe import nn
from tnmoe.nn.routing.capacity import slots_within_capacity
from tnmoe.nn.routing.counts import count_slots_per_token


def accepted_by_counting(index, kept, capacity, num_experts):
    """The definition: a running count of the choices that asked for each expert."""
    first = torch.zeros_like(kept)
    for of_sequence, index_of, kept_of, room in zip(
        first.chunk(len(capacity)),
        index.chunk(len(capacity)),
        kept.chunk(len(capacity)),
        capacity,
        strict=True,
    ):
        taken = [0] * num_experts
        for choice in range(index.shape[1]):
            for token in range(len(index_of)):
                if kept_of[token, choice]:
                    taken[index_of[token, choice]] += 1
                    of_sequence[token, choice] = taken[index_of[token, choice]] <= room
    return first


@st.composite
def choices(draw):
    experts, sequences, length = (draw(st.integers(1, high)) for high in (7, 3, 8))
    size = (sequences * length, draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    index = torch.randint(experts, size, generator=generator)
    kept = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    room = torch.randint(1, 6, (sequences,), generator=generator).double()
    return index, kept, room, experts


@given(choices())
@settings(max_examples=100)
def test_the_first_of_each_expert_are_those_that_a_count_of_them_finds(drawn):
    assert slots_within_capacity(*drawn).equal(accepted_by_counting(*drawn))


def test_the_first_of_each_expert_of_no_tokens_are_none():
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert slots_within_capacity(none, none.bool(), torch.ones(1), 4).shape == (0, 2)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_the_first_of_each_expert_have_a_shape_where_there_are_no_numbers(device):
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


@given(choices())
def test_choices_per_token_are_those_of_a_one_hot_table(drawn):
    index, kept, _, experts = drawn
    index = torch.where(kept, index, experts)  # E stands for none
    table = F.one_hot(index, experts + 1)[..., :experts].sum(-2)
    assert count_slots_per_token(index, experts).equal(table.float())


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operator made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        self.numbers = max(self.numbers, *sizes, 0)
        return result


TOKENS, EXPERTS, TOP_K = 64, 96, 16


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.5, "capacity_scope": "sequence"},
        {"load_bias": True, "score_function": "sigmoid"},
        {"num_groups": 8, "top_groups": 4},
    ],
    ids=str,
)
def test_a_router_makes_no_table_of_all_choices_and_all_experts(settings):
    router = nn.TopKRouter(8, EXPERTS, TOP_K, **settings)
    x = torch.randn(4, TOKENS // 4, 8)
    with LargestTensor() as largest:
        router(x, torch.rand(TOKENS) < 0.8)[1].sum().backward()
    assert largest.numbers <= 2 * TOKENS * EXPERTS


@pytest.mark.parametrize("kind", ["top_k", "expert choice"])
@pytest.mark.parametrize(
    "use",
    [
        lambda routing: routing.balance_loss().backward(),
        lambda routing: routing.balance_loss(scope="sequence").backward(),
        lambda routing: routing.z_loss().backward(),
        lambda routing: routing.counts(),
        nn.routing_statistics,
    ],
    ids=["balance", "balance of sequences", "z", "counts", "statistics"],
)
def test_losses_and_statistics_make_no_table_of_all_choices_and_all_experts(use, kind):
    router = (
        nn.TopKRouter(8, EXPERTS, TOP_K)
        if kind == "top_k"
        else nn.ExpertChoiceRouter(8, EXPERTS, TOP_K)
    )
    with nn.record_routing(router) as routing:
        router(torch.randn(4, TOKENS // 4, 8))
    with LargestTensor() as largest:
        use(routing)
    assert largest.numbers <= 2 * TOKENS * EXPERTS
