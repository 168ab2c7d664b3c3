"""Balance: losses against transformers', biases moved by load, and what is recorded."""

import copy
import multiprocessing
import pickle
import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    router_z_loss_func,
)

import tnmoe as tn
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


def test_losses_count_what_tokens_asked_for_and_not_what_they_got():
    torch.manual_seed(0)
    router = nn.TopKRouter(8, 4, 2, capacity_factor=0.25)
    x = torch.randn(20, 8)
    with nn.record_routing(router) as routing:
        logits, _, index = router(x)
    (call,) = routing.calls
    assert (call.index == 4).any()
    assert torch.equal(call.choices, logits.topk(2).indices)
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
    return nn.TopKRouter(8, 4, 1, "sigmoid", load_bias=True, **details)


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


def _balance_one_rank(rank, port, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    bias = nn.LoadBias(2)
    # Rank 0 alone would favour expert 1, both ranks together favour expert 0.
    bias.count(torch.tensor([[0]] * 3 if rank == 0 else [[1]] * 9), None)
    bias.update(0.5)
    results.put((rank, bias.value.tolist()))
    torch.distributed.destroy_process_group()


def test_ranks_of_a_distributed_run_move_biases_by_the_load_of_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_balance_one_rank, args=(rank, port, results)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert found == {0: [0.5, -0.5], 1: [0.5, -0.5]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda router, o: nn.BiasBalancer(o, nn.TopKRouter(8, 4)), "no router has load_bias"),
        (lambda router, o: nn.BiasBalancer(o, router, -1.0), "rate must be at least 0, got -1.0"),
    ],
)
def test_bad_input_is_named(make, message):
    router = biased()
    with pytest.raises(tn.InputError, match=message):
        make(router, torch.optim.SGD(router.parameters(), lr=0.1))
