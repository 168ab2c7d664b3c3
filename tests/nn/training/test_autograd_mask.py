"""The gradient mask for engines whose optimiser steps inside backward."""

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward

import tnmoe as tn
from tests.nn.training.small_layer import loss_of, make_layer, train_step
from tnmoe import nn


def stepping_in_backward(layer):
    """torch's own such engine: every tensor is updated as soon as its gradient is there."""
    _apply_optimizer_in_backward(torch.optim.SGD, layer.parameters(), {"lr": 0.01})


def test_an_engine_that_steps_in_backward_skips_what_the_other_mask_skips():
    engine, plain = make_layer(), make_layer()
    stepping_in_backward(engine)
    mask = nn.AutogradMask(engine, 0.5, seed=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    other = nn.GradientMask(optimizer, plain, 0.5, seed=5)
    for step in range(12):
        with mask.next_step():
            loss_of(engine, step).backward()
        train_step(plain, optimizer, step)
        for one, two in zip(engine.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert mask.state_dict() == other.state_dict()
    assert 0 < mask.masked_steps < 12
    assert all(each.requires_grad for each in engine.parameters())


def test_a_step_that_fails_is_no_step_and_frozen_tensors_stay_frozen():
    layer = make_layer()
    layer.experts.up.center.requires_grad_(False)
    mask = nn.AutogradMask(layer, 1.0)
    with pytest.raises(RuntimeError, match="lost"), mask.next_step():
        raise RuntimeError("lost")
    assert mask.step == 0
    with mask.next_step():
        assert not layer.experts.down.center.requires_grad
        for part in range(2):  # several passes make one step
            loss_of(layer, part).backward()
    assert mask.step == 1
    assert layer.experts.down.center.requires_grad
    assert not layer.experts.up.center.requires_grad
    assert layer.experts.down.center.grad is None
    assert layer.experts.down.aux[0].grad is not None


def test_gradients_left_as_zeros_move_no_masked_tensor_by_its_momentum():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    mask = nn.AutogradMask(layer, lambda step: float(step == 1))
    for step in range(2):
        optimizer.zero_grad(set_to_none=False)
        before = layer.experts.up.center.detach().clone()
        with mask.next_step():
            loss_of(layer, step).backward()
        optimizer.step()
        assert torch.equal(before, layer.experts.up.center) == (step == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer: nn.AutogradMask(layer, 2), r"probability must be in \[0, 1\], got 2"),
    ],
)
def test_a_bad_probability_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make(make_layer())
