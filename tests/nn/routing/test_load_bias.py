"""Load biases: counted slots, saved values, ranks that agree."""

import copy
import pickle

import pytest
import torch

from tests.nn.ranks import on_two_ranks
from tnmoe import nn


def biased(**details):
    return nn.TopKRouter(8, 4, 1, score_function="sigmoid", load_bias=True, **details)


def test_every_choice_of_a_token_is_counted():
    router = nn.TopKRouter(8, 4, 3, load_bias=True)
    _, _, index = router(torch.randn(20, 8))
    expected = torch.bincount(index.flatten(), minlength=4)
    assert torch.equal(router.load_bias.counts, expected)
    router(torch.randn(5, 8))
    assert router.load_bias.counts.sum() == 75


def test_padding_and_evaluation_are_not_counted():
    router = biased()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    router(x, mask)
    assert router.load_bias.counts.sum() == 4
    router.eval()(x)
    assert router.load_bias.counts.sum() == 4


def test_biases_keep_their_precision_when_the_model_is_cast_and_are_saved():
    router = biased()
    router.load_bias.value.copy_(torch.tensor([1e-3, 0.3331, -0.2, 7e-5]))
    value = router.load_bias.value.clone()
    assert torch.equal(router.half().load_bias.value, value)
    assert torch.equal(router.bfloat16().double().float().load_bias.value, value)
    assert set(router.state_dict()) == {"weight", "load_bias.value"}
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(twin.load_bias.value, value)
    empty = biased(device="meta").to_empty(device="cpu").half()
    assert empty.load_bias.value.dtype == torch.float32
    empty.load_state_dict(router.state_dict())
    assert torch.equal(empty.load_bias.value, value)
    half = {name: each.half() for name, each in router.state_dict().items()}
    for made in (biased(device="meta").to_empty(device="cpu"), biased(device="meta")):
        made.load_state_dict(half, assign=True)
        assert made.load_bias.value.dtype == torch.float32
        made.float()(torch.randn(7, 8))
        assert made.load_bias.counts.sum() == 7
        before = made.load_bias.value.clone()
        made.load_bias.update(1e-3)
        assert (made.load_bias.value != before).any()


def _count_under_ddp(rank):
    torch.manual_seed(0)
    router = nn.TopKRouter(8, 4, 2, load_bias=True)
    model = torch.nn.parallel.DistributedDataParallel(router)
    torch.manual_seed(rank + 1)
    expected = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        _, weights, index = model(torch.randn(9, 8))
        weights.square().sum().backward()
        expected += torch.bincount(index.flatten(), minlength=4)
    return router.load_bias.counts.tolist(), expected.tolist()


def _balance_one_rank(rank):
    bias = nn.LoadBias(2)
    # Rank 0 alone would favour expert 1, both ranks together favour expert 0.
    bias.count(torch.tensor([[0]] * 3 if rank == 0 else [[1]] * 9), None)
    bias.update(0.5)
    return bias.value.tolist()


def test_ranks_of_a_distributed_run_move_biases_by_the_load_of_all():
    assert on_two_ranks(_balance_one_rank) == [[0.5, -0.5]] * 2


@pytest.mark.slow
def test_ranks_count_their_own_load_over_several_passes_before_a_step():
    for counts, expected in on_two_ranks(_count_under_ddp):
        assert counts == expected
