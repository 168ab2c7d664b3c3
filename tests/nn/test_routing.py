"""Routers, their losses and what is recorded of them, against transformers' Switch and Mixtral."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    router_z_loss_func,
)

import tnmoe as tn
from tnmoe import nn


@pytest.mark.parametrize("top_k", [2, 3])
def test_normalised_top_k_equals_mixtrals_router_with_its_gradient(top_k):
    config = MixtralConfig(hidden_size=8, num_local_experts=5, num_experts_per_tok=top_k)
    theirs, ours = MixtralTopKRouter(config), nn.TopKRouter(8, 5, top_k)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(5, 8))
        ours.weight.copy_(theirs.weight)
    x, probe = torch.randn(7, 8), torch.randn(7, top_k)
    expected_logits, expected_weights, expected_index = theirs(x)
    logits, weights, index = ours(x)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(index, expected_index)
    (expected_weights * probe).sum().backward()
    (weights * probe).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_top_one_weight_is_one_and_still_teaches_the_router():
    router = nn.TopKRouter(8, 4)
    x = torch.randn(5, 8)
    _, weights, index = router(x)
    assert (weights == 1).all()
    weights.sum().backward()
    # The gradient is that of the log-probability of the chosen expert.
    twin = router.weight.detach().clone().requires_grad_()
    chosen = (x @ twin.T).log_softmax(-1).gather(-1, index)
    chosen.sum().backward()
    torch.testing.assert_close(router.weight.grad, twin.grad)
    assert (router.weight.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_single_precision_under_autocast_and_half_models(dtype):
    router = nn.TopKRouter(8, 4, top_k=2)
    x = torch.randn(5, 8)
    expected = router(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    logits, weights, _ = router.to(dtype)(x.to(dtype))
    assert (logits.dtype, weights.dtype) == (torch.float32, dtype)


def test_jitter_acts_in_training_only():
    router = nn.TopKRouter(8, 4, jitter_noise=0.5)
    x = torch.randn(5, 8)
    assert (router(x)[0] != router(x)[0]).any()
    router.eval()
    assert (router(x)[0] == router(x)[0]).all()


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


def test_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    balanced = torch.eye(4) * 50
    assert float(nn.load_balancing_loss(balanced, balanced.topk(1).indices)) == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]] * 4)
    assert float(nn.load_balancing_loss(collapsed, collapsed.topk(1).indices)) == pytest.approx(4)


def test_z_loss_equals_switch_transformers():
    logits = torch.randn(2, 5, 4)
    torch.testing.assert_close(nn.router_z_loss(logits.reshape(10, 4)), router_z_loss_func(logits))


def test_padding_counts_in_no_loss_and_no_load():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), nn.DenseExperts(4, 8, 8))
    x = torch.randn(2, 3, 8)
    with nn.record_routing(layer) as whole:
        layer(x)
    with nn.record_routing(layer) as real:
        layer(x[mask.bool()])
    torch.testing.assert_close(whole.balance_loss(mask), real.balance_loss())
    torch.testing.assert_close(whole.z_loss(mask), real.z_loss())
    assert (whole.counts(mask) == real.counts()).all()
    assert real.counts().sum() == 3 * 2


def test_recording_ends_with_its_block_and_needs_a_router():
    layer = nn.MPOMoE(nn.TopKRouter(8, 4), nn.DenseExperts(4, 8, 8))
    with nn.record_routing(layer) as routing:
        layer(torch.randn(3, 8))
    layer(torch.randn(3, 8))
    assert routing.names == ["router"]
    with nn.record_routing(torch.nn.Linear(2, 2)) as nothing:
        pass
    with pytest.raises(tn.InputError, match="no routing was recorded"):
        nothing.balance_loss()


@given(st.integers(0, 1000), st.integers(1, 3))
def test_permuting_tokens_commutes_with_the_layer_and_batches_split(seed, top_k):
    torch.manual_seed(seed)
    layer = nn.MPOMoE(
        nn.TopKRouter(8, 3, top_k, dtype=torch.float64),
        nn.MPOExperts(3, 8, 12, sites=2, dtype=torch.float64),
    )
    x = torch.randn(9, 8, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[order]), layer(x)[order])
    torch.testing.assert_close(torch.cat([layer(x[:4]), layer(x[4:])]), layer(x))
