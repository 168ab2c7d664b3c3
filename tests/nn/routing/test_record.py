"""Records of routing: losses and counts are those of the calls in a block."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tnmoe as tn
from tnmoe import nn


def test_losses_of_a_recording_are_those_of_the_routers_scores():
    router = nn.TopKRouter(8, 4, 2, score_function="sigmoid")
    with nn.record_routing(router) as routing:
        logits, _, index = router(torch.randn(20, 8))
    expected = nn.load_balancing_loss(logits, index, score_function="sigmoid")
    torch.testing.assert_close(routing.balance_loss(), expected)
    assert not torch.allclose(expected, nn.load_balancing_loss(logits, index))


def test_a_given_mask_counts_before_the_routers_own():
    router, x = nn.TopKRouter(8, 4, 2), torch.randn(2, 3, 8)
    own, given = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 0], [1, 1, 1]])
    for record in (lambda: router(x, own), lambda: router(x, token_mask=own)):
        with nn.record_routing(router) as routing:
            record()
        assert routing.counts().sum() == 2 * 5
        assert routing.counts(given).sum() == 2 * 4
        with nn.record_routing(router) as real:
            router(x[given == 1])
        torch.testing.assert_close(routing.balance_loss(given), real.balance_loss())


def test_losses_count_the_chosen_experts_and_not_those_that_a_capacity_leaves():
    torch.manual_seed(0)
    router = nn.TopKRouter(8, 4, 2, capacity_factor=0.25)
    x = torch.randn(20, 8)
    with nn.record_routing(router) as routing:
        logits, _, index = router(x)
    (call,) = routing.calls
    assert (call.index == 4).any()
    assert torch.equal(call.chosen, logits.topk(2).indices)
    assert torch.equal(call.index, index)
    torch.testing.assert_close(
        routing.balance_loss(), nn.load_balancing_loss(logits, logits.topk(2).indices)
    )
    assert routing.counts().sum() == (index < 4).sum()


def test_padding_counts_in_no_loss_and_no_load():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), nn.DenseExperts(4, 8, 8))
    x = torch.randn(2, 3, 8)
    with nn.record_routing(layer) as whole:
        layer(x)
    with nn.record_routing(layer) as masked:
        layer(x, token_mask=mask)
    with nn.record_routing(layer) as real:
        layer(x[mask.bool()])
    for loss in (whole.balance_loss(mask), masked.balance_loss()):
        torch.testing.assert_close(loss, real.balance_loss())
    for loss in (whole.z_loss(mask), masked.z_loss()):
        torch.testing.assert_close(loss, real.z_loss())
    assert (whole.counts(mask) == real.counts()).all()
    assert (masked.counts() == real.counts()).all()
    assert real.counts().sum() == 3 * 2


def test_losses_of_a_recording_can_be_taken_per_sequence():
    layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), nn.DenseExperts(4, 8, 8))
    x = torch.randn(3, 5, 8)
    with nn.record_routing(layer) as routing:
        layer(x)
    parts = []
    for sequence in x:
        with nn.record_routing(layer) as alone:
            layer(sequence)
        parts.append(torch.stack([alone.balance_loss(), alone.z_loss()]))
    both = routing.balance_loss(scope="sequence"), routing.z_loss(scope="sequence")
    torch.testing.assert_close(torch.stack(both), torch.stack(parts).mean(0))
    with pytest.raises(
        tn.InputError, match="scope must be one of batch, sequence, ranks, got 'token'"
    ):
        routing.balance_loss(scope="token")


def test_recording_ends_with_a_block_that_fails_and_copies_do_not_record():
    layer = nn.MPOMoE(nn.TopKRouter(8, 4), nn.DenseExperts(4, 8, 8))
    with nn.record_routing(layer) as copied:
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    with pytest.raises(tn.InputError), nn.record_routing(layer) as routing:
        layer(torch.randn(3, 7))
    for each in (layer, *twins):
        each(torch.randn(3, 8))
    assert routing.calls == copied.calls == []


def test_recordings_nest():
    layer = nn.MPOMoE(nn.TopKRouter(8, 4), nn.DenseExperts(4, 8, 8))
    with nn.record_routing(layer) as outer:
        with nn.record_routing(layer) as inner:
            layer(torch.randn(3, 8))
        layer(torch.randn(3, 8))
    assert (len(inner.calls), len(outer.calls)) == (1, 2)


@pytest.mark.slow
def test_layers_compiled_before_the_block_are_recorded_too():
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(nn.MPOMoE(nn.TopKRouter(8, 4, 2), nn.MPOExperts(4, 8, 8)) for _ in range(2))
    )
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    compiled(x)
    with nn.record_routing(layers) as expected:
        layers(x)
    for _ in range(3):
        with nn.record_routing(compiled) as routing:
            compiled(x)
        assert len(routing.calls) == 2
        torch.testing.assert_close(routing.balance_loss(), expected.balance_loss())
        assert routing.balance_loss().requires_grad
    compiled(x)
    assert len(routing.calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_calls_again_is_neither_recorded_nor_counted_twice(reentrant):
    layer = nn.MPOMoE(nn.TopKRouter(8, 4, load_bias=True), nn.MPOExperts(4, 8, 8))
    x = torch.randn(2, 5, 8, requires_grad=True)
    with nn.record_routing(layer) as routing:
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert len(routing.calls) == 1
    assert layer.router.load_bias.counts.sum() == 10
    if reentrant:
        with pytest.warns(UserWarning, match="this loss teaches no router"):
            routing.balance_loss()
    else:
        assert routing.balance_loss().requires_grad
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # to look at, it will do
        routing.balance_loss()
        layer.eval()
        with nn.record_routing(layer) as routing:
            layer(x)
    routing.balance_loss()


def test_counts_of_nothing_or_of_unlike_routers_are_refused():
    routers = torch.nn.ModuleList([nn.TopKRouter(8, 4), nn.TopKRouter(8, 3)])
    with nn.record_routing(routers) as routing:
        with pytest.raises(tn.InputError, match="got no call of a router"):
            routing.counts()
        for router in routers:
            router(torch.randn(3, 8))
    with pytest.raises(tn.InputError, match="one number of experts, got 3, 4"):
        routing.counts()
    assert routing.balance_loss() > 0


def test_recording_ends_with_its_block_and_needs_a_router():
    layer = nn.MPOMoE(nn.TopKRouter(8, 4), nn.DenseExperts(4, 8, 8))
    with nn.record_routing(layer) as routing:
        layer(torch.randn(3, 8))
    layer(torch.randn(3, 8))
    assert [call.name for call in routing.calls] == ["router"]
    with nn.record_routing(torch.nn.Linear(2, 2)) as nothing:
        pass
    with pytest.raises(tn.InputError, match="no routing was recorded"):
        nothing.balance_loss()
