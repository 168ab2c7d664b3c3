"""The state of an optimiser follows the experts that it trains."""

import copy

import pytest
import torch

from tests.nn.editing.layers import KINDS, make, tokens
from tnmoe import nn
from tnmoe.errors import InputError

OPTIMIZERS = {
    "AdamW": lambda given: torch.optim.AdamW(given, lr=0.01),
    "AdamW, foreach": lambda given: torch.optim.AdamW(given, lr=0.01, foreach=True),
    "AdamW, fused": lambda given: torch.optim.AdamW(given, lr=0.01, fused=True),
    "Adam, amsgrad": lambda given: torch.optim.Adam(given, lr=0.01, amsgrad=True),
    "SGD, momentum": lambda given: torch.optim.SGD(given, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGD": lambda given: torch.optim.SGD(given, lr=0.01),
    "RMSprop": lambda given: torch.optim.RMSprop(given, lr=0.001, momentum=0.5, centered=True),
    "Adagrad": lambda given: torch.optim.Adagrad(given, lr=0.01),
}


def groups_of(layer):
    router, experts = layer.router.parameters(), layer.experts.parameters()
    return [{"params": router, "lr": 0.005}, {"params": experts, "weight_decay": 0.1}]


def train(layer, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        layer(tokens(seed=step)).sin().square().sum().backward()
        optimizer.step()


def assert_same_numbers(one, other, **tolerance):
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name, **tolerance)


@pytest.mark.parametrize("kind", ["interleaved; biases", "residual", "low rank", "hidden; linear"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_experts_had_always_had_this_order(name, kind):
    changed = make(kind)
    steady = copy.deepcopy(changed)
    optimizers = [OPTIMIZERS[name](groups_of(each)) for each in (changed, steady)]
    order = [2, 0, 3, 1]
    train(changed, optimizers[0], 3)
    nn.reorder_experts(changed, order, optimizer=optimizers[0])
    train(changed, optimizers[0], 3, first=3)
    train(steady, optimizers[1], 6)
    nn.reorder_experts(steady, order)
    assert_same_numbers(changed, steady, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_newcomers_do_not_touch_the_training_of_the_others(kind):
    grown = make(kind)
    steady = copy.deepcopy(grown)
    optimizers = [torch.optim.AdamW(groups_of(each), lr=0.01) for each in (grown, steady)]
    train(grown, optimizers[0], 2)
    nn.add_experts(grown, 2, optimizer=optimizers[0])
    train(grown, optimizers[0], 2, first=2)
    train(steady, optimizers[1], 4)
    for new, old in zip(grown.parameters(), steady.parameters(), strict=True):
        assert torch.equal(new[: len(old)], old)


@pytest.mark.parametrize("name", ["AdamW", "Adam, amsgrad", "SGD, momentum", "RMSprop"])
def test_newcomers_start_with_a_state_of_zeros_and_the_count_of_steps(name):
    layer = make("interleaved; biases")
    optimizer = OPTIMIZERS[name](groups_of(layer))
    train(layer, optimizer, 3)
    bias = layer.experts.up.bias
    before = {key: copy.deepcopy(value) for key, value in optimizer.state[bias].items()}
    nn.remove_experts(layer, 1, optimizer=optimizer)
    nn.add_experts(layer, 2, optimizer=optimizer)
    for key, value in optimizer.state[bias].items():
        if key == "step":
            assert value == before[key] == 3
        else:
            assert torch.equal(value[:3], before[key][[0, 2, 3]])
            assert value.shape == bias.shape
            assert not value[3:].any()


def test_parameters_and_groups_stay_the_same_objects():
    layer = make("interleaved; gated, biases", noisy=True)
    optimizer = torch.optim.AdamW(groups_of(layer))
    parameters = dict(layer.named_parameters())
    held = [[id(each) for each in group["params"]] for group in optimizer.param_groups]
    train(layer, optimizer, 1)
    nn.add_experts(layer, 2, optimizer=optimizer)
    nn.open_experts(layer)
    nn.merge_experts(layer, [0, 5], optimizer=optimizer)
    nn.remove_experts(layer, 1, optimizer=optimizer)
    assert all(parameters[name] is each for name, each in layer.named_parameters())
    assert held == [[id(each) for each in group["params"]] for group in optimizer.param_groups]
    train(layer, optimizer, 2)


def test_means_over_an_axis_stay_and_follow():
    layer = make("stacked", dtype=torch.float32)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(tokens(torch.float32)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.router.weight]
    rows, columns = state["row_var"].clone(), state["col_var"].clone()
    nn.remove_experts(layer, 0, optimizer=optimizer)
    assert torch.equal(state["row_var"], rows[1:])
    assert torch.equal(state["col_var"], columns)
    layer(tokens(torch.float32)).square().sum().backward()
    optimizer.step()


def test_frozen_parameters_need_no_state():
    layer = make("residual")
    nn.freeze_shared(layer)
    layer.experts.down.requires_grad_(False)
    trained = [each for each in layer.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    train(layer, optimizer, 2)
    nn.add_experts(layer, 1, optimizer=optimizer)
    nn.open_experts(layer)
    train(layer, optimizer, 2)
    assert not layer.experts.down.delta.aux_0.requires_grad


def test_a_gradient_mask_goes_on():
    layer = make("interleaved")
    optimizer = torch.optim.AdamW(layer.parameters())
    with nn.GradientMask(optimizer, layer, probability=1.0) as mask:
        train(layer, optimizer, 2)
        center = layer.experts.up.center.clone()
        nn.add_experts(layer, 2, optimizer=optimizer)
        nn.open_experts(layer)
        nn.merge_experts(layer, [0, 4], optimizer=optimizer)
        train(layer, optimizer, 2)
    assert torch.equal(layer.experts.up.center, center)
    assert mask.masked_steps == 4
    assert set(mask.updates.values()) == {0}


def test_a_wrapped_optimizer_is_found():
    layer = make("stacked")
    optimizer = torch.optim.AdamW(layer.parameters())
    wrapper = type("Wrapper", (), {"optimizer": optimizer})()
    train(layer, optimizer, 1)
    nn.add_experts(layer, optimizer=wrapper)
    train(layer, optimizer, 1)


def assert_refused(layer, optimizer, message):
    numbers = [each.clone() for each in layer.parameters()]
    for change in (
        lambda: nn.add_experts(layer, optimizer=optimizer),
        lambda: nn.remove_experts(layer, 0, optimizer=optimizer),
        lambda: nn.reorder_experts(layer, [3, 2, 1, 0], optimizer=optimizer),
        lambda: nn.merge_experts(layer, [0, 1], optimizer=optimizer),
    ):
        with pytest.raises(InputError, match=message):
            change()
    assert layer.router.num_experts == layer.experts.num_experts == 4
    assert all(map(torch.equal, layer.parameters(), numbers))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.ASGD])
def test_optimizers_whose_state_does_not_start_at_zero_are_refused(kind):
    layer = make("stacked")
    assert_refused(layer, kind(layer.parameters()), f"the state of {kind.__name__} cannot follow")


def test_optimizers_of_other_parameters_are_refused():
    layer = make("stacked")
    optimizer = torch.optim.AdamW(copy.deepcopy(layer).parameters())
    assert_refused(layer, optimizer, "the optimizer holds no parameter that experts")
    assert_refused(layer, "AdamW", "optimizer must be a torch.optim.Optimizer, got str")


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    layer = make("interleaved")
    optimizer = torch.optim.AdamW(layer.parameters())
    train(layer, optimizer, 1)
    last = layer.experts.down.aux_1
    optimizer.state[last]["exp_avg"] = torch.zeros(7)
    message = r"keeps 'exp_avg' of shape \(7,\) for experts.down.aux_1 of shape"
    assert_refused(layer, optimizer, message)


def test_an_old_loss_does_not_keep_old_shapes():
    layer, x = make("interleaved; biases"), tokens()
    old = layer(x).sin().sum()
    old.backward()
    nn.add_experts(layer, 2)
    nn.open_experts(layer)
    new = layer(x).sin().sum()
    new.backward()
    expected = copy.deepcopy(layer)
    expected.zero_grad()
    expected(x).sin().sum().backward()
    for one, other in zip(layer.parameters(), expected.parameters(), strict=True):
        assert one.grad.shape == one.shape == other.grad.shape


def test_hooks_on_gradients_stay():
    layer = make("stacked")
    seen = []
    layer.experts.up.stacked.register_hook(lambda gradient: seen.append(len(gradient)))
    layer(tokens()).sum().backward()
    nn.add_experts(layer, 2)
    layer(tokens()).sum().backward()
    assert seen == [4, 6]
