"""Balance: losses against transformers', biases moved by load, and what is recorded."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    router_z_loss_func,
)

import tnmoe as tn
from tests.nn.ranks import on_two_ranks
from tnmoe import nn


@given(st.integers(2, 6), st.integers(1, 30), st.integers(0, 100), st.booleans())
def test_balance_loss_equals_transformers(experts, tokens, seed, masked):
    torch.manual_seed(seed)
    top_k = 1 + seed % experts
    logits = torch.randn(tokens, experts)
    index = logits.topk(top_k).indices
    mask = torch.rand(1, tokens) < 0.7 if masked else torch.ones(1, tokens, dtype=torch.bool)
    mask[0, 0] = True
    expected = load_balancing_loss_func((logits,), experts, top_k, mask.long() if masked else None)
    # transformers sums the load over the k choices, so that balance gives k; ours gives 1.
    ours = nn.load_balancing_loss(logits, index, mask if masked else None)
    torch.testing.assert_close(ours, expected / top_k)


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse(form):
    balanced = torch.eye(4) * 50
    index = balanced.topk(1).indices
    assert float(nn.load_balancing_loss(balanced, index, form=form)) == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]] * 4)
    index = collapsed.topk(1).indices
    assert float(nn.load_balancing_loss(collapsed, index, form=form)) == pytest.approx(4)


@given(st.integers(0, 100))
def test_the_form_of_gshard_counts_first_choices(seed):
    torch.manual_seed(seed)
    logits = torch.randn(20, 5)
    index = logits.topk(2).indices
    counts = torch.bincount(index[:, 0], minlength=5) / 20
    # Algorithm 1: the mean over experts of c/S times m, here times E².
    expected = (counts * logits.softmax(-1).mean(0)).mean() * 25
    torch.testing.assert_close(nn.load_balancing_loss(logits, index, form="gshard"), expected)


@given(st.integers(0, 100), st.booleans())
def test_a_loss_per_sequence_is_the_mean_of_the_sequences_losses(seed, masked):
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 4)
    index = logits.topk(2).indices
    mask = torch.rand(3, 5) < 0.6 if masked else torch.ones(3, 5, dtype=torch.bool)
    mask[0, 0] = True
    mask[2] = False  # a sequence of nothing but padding counts for nothing
    common = {"sequences": 3, "attention_mask": mask}
    whole = nn.load_balancing_loss(logits.view(15, 4), index.view(15, 2), **common)
    present = [b for b in range(3) if mask[b].any()]
    parts = [nn.load_balancing_loss(logits[b][mask[b]], index[b][mask[b]]) for b in present]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    z_parts = [nn.router_z_loss(logits[b][mask[b]]) for b in present]
    torch.testing.assert_close(
        nn.router_z_loss(logits.view(15, 4), **common), torch.stack(z_parts).mean()
    )


def test_scores_of_sigmoid_routers_are_normalised_over_experts_in_the_loss():
    logits = torch.randn(20, 5)
    index = logits.topk(2).indices
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    load = torch.bincount(index.flatten(), minlength=5) / 40
    expected = 5 * (load * scores.mean(0)).sum()
    ours = nn.load_balancing_loss(logits, index, score_function="sigmoid")
    torch.testing.assert_close(ours, expected)


def test_scores_of_sigmoids_too_small_for_a_number_still_have_shares():
    logits = torch.tensor([[-300.0, -301.0, -500.0]] * 4)
    loss = nn.load_balancing_loss(logits, logits.topk(1).indices, score_function="sigmoid")
    share = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(loss, 3 * share)


def test_slots_without_an_expert_are_no_load():
    logits = torch.randn(6, 3)
    some = torch.tensor([[0, 3], [1, 3], [1, 2], [3, 3], [0, 2], [1, 0]])
    counts = torch.bincount(some.flatten(), minlength=4)[:3]
    expected = 3 * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(nn.load_balancing_loss(logits, some), expected)


def test_losses_are_computed_in_single_precision_whatever_surrounds_them():
    torch.manual_seed(0)
    logits = (4 * torch.randn(3000, 16)).requires_grad_()
    index = logits.topk(2).indices

    def both(logits):
        return nn.load_balancing_loss(logits, index), nn.router_z_loss(logits)

    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(both(logits), both(logits), strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        inside = torch.autograd.grad(sum(both(logits)), logits)[0]
    torch.testing.assert_close(inside, torch.autograd.grad(sum(both(logits)), logits)[0])
    half = logits.detach().half()
    for one, other in zip(both(half), both(half.float()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_z_loss_equals_switch_transformers():
    logits = torch.randn(2, 5, 4)
    torch.testing.assert_close(nn.router_z_loss(logits.reshape(10, 4)), router_z_loss_func(logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "mean"}, "form must be one of switch, gshard, got 'mean'"),
        ({"score_function": "relu"}, "score_function must be one of softmax, sigmoid"),
        ({"sequences": 4}, "10 tokens are not 4 sequences of the same length"),
        ({"attention_mask": torch.ones(3)}, r"each of 10 tokens, got shape \(3,\)"),
    ],
)
def test_losses_of_what_does_not_fit_are_refused(options, message):
    logits = torch.randn(10, 4)
    with pytest.raises(tn.InputError, match=message):
        nn.load_balancing_loss(logits, logits.topk(1).indices, **options)


@pytest.mark.parametrize(
    ("logits", "index", "message"),
    [
        ((5, 4), (5,), r"got \(5, 4\) and \(5,\)"),
        ((5, 4), (6, 1), r"got \(5, 4\) and \(6, 1\)"),
        ((2, 5, 4), (10, 1), r"got \(2, 5, 4\) and \(10, 1\)"),
    ],
)
def test_routing_that_does_not_fit_is_named(logits, index, message):
    with pytest.raises(tn.InputError, match=message):
        nn.load_balancing_loss(torch.zeros(logits), torch.zeros(index, dtype=torch.int64))
    with pytest.raises(tn.InputError, match=r"of torch\.float32"):
        nn.load_balancing_loss(torch.zeros(5, 4), torch.zeros(5, 1))
    with pytest.raises(tn.InputError, match="from 0 to 3, or 4 for none, got 0 to 5"):
        nn.load_balancing_loss(torch.zeros(2, 4), torch.tensor([[0], [5]]))
    with pytest.raises(tn.InputError, match=r"router_logits \(T, E\), got \(2, 5, 4\)"):
        nn.router_z_loss(torch.zeros(2, 5, 4))


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


def test_losses_count_what_tokens_asked_for_and_not_what_they_got():
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
    with pytest.raises(tn.InputError, match="scope must be one of batch, sequence, got 'token'"):
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


# ---- biases moved by load


def biased(**details):
    return nn.TopKRouter(8, 4, 1, score_function="sigmoid", load_bias=True, **details)


def test_a_bias_moves_by_the_sign_of_what_an_expert_lacks_and_chooses_but_does_not_weigh():
    torch.manual_seed(0)
    router, x = biased(normalize=False), torch.randn(50, 8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    counts = torch.bincount(router.eval()(x)[2].flatten(), minlength=4)
    router.train()
    with nn.BiasBalancer(optimizer, router, rate=0.1):
        router(x)
        optimizer.step()
    expected = 0.1 * torch.sign(50 / 4 - counts)
    torch.testing.assert_close(router.load_bias.value, expected)
    logits, weights, index = router(x)
    assert torch.equal(index[:, 0], (logits.sigmoid() + expected).argmax(-1))
    torch.testing.assert_close(weights, logits.sigmoid().gather(-1, index))
    optimizer.step()  # without the balancer nothing moves
    torch.testing.assert_close(router.load_bias.value, expected)


def test_biases_balance_a_skewed_router():
    torch.manual_seed(0)
    router = biased()
    x = torch.randn(400, 8) + 1
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[0] += 0.2
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    with nn.BiasBalancer(optimizer, router, rate=0.002):
        for step in range(300):
            with nn.record_routing(router) as routing:
                router(x)
            optimizer.step()
            if step == 0:
                before = nn.routing_statistics(routing)[""].max_violation
    after = nn.routing_statistics(routing)[""].max_violation
    assert before > 1
    assert after < 0.25


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


def test_ranks_count_their_own_load_over_several_passes_before_a_step():
    for counts, expected in on_two_ranks(_count_under_ddp):
        assert counts == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda router, o: nn.BiasBalancer(o, nn.TopKRouter(8, 4)), "no router has load_bias"),
        (
            lambda router, o: nn.BiasBalancer(o, router, -1.0),
            r"rate must be in \[0, inf\), got -1.0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    router = biased()
    with pytest.raises(tn.InputError, match=message):
        make(router, torch.optim.SGD(router.parameters(), lr=0.1))
