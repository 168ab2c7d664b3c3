"""Auxiliary losses against transformers' own and their definitions."""

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
