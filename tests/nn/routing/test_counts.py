"""Slots are counted without a table of all slots and all experts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.nn.routing.slots import slots
from tnmoe import nn
from tnmoe.nn.routing.counts import count_slots_per_token


@given(slots())
def test_slots_per_token_are_those_of_a_one_hot_table(drawn):
    index, kept, _, experts = drawn
    index = torch.where(kept, index, experts)  # E marks a slot without an expert
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
def test_a_router_makes_no_table_of_all_slots_and_all_experts(settings):
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
def test_losses_and_statistics_make_no_table_of_all_slots_and_all_experts(use, kind):
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
