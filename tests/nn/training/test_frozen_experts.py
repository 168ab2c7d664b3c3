"""Frozen experts keep every bit while other experts of their layer train."""

import copy
from itertools import product

import pytest
import torch

from tests.nn.editing.layers import KINDS, make, tokens
from tnmoe import nn
from tnmoe.errors import InputError
from tnmoe.nn.owned_rows import owned_rows

OPTIMIZERS = {
    "AdamW": lambda given: torch.optim.AdamW(given, lr=0.05, weight_decay=0.1),
    "AdamW, fused": lambda given: torch.optim.AdamW(given, lr=0.05, weight_decay=0.1, fused=True),
    "AdamW, foreach": lambda given: torch.optim.AdamW(given, lr=0.05, foreach=True),
    "SGD, momentum": lambda given: torch.optim.SGD(given, 0.05, momentum=0.9, weight_decay=0.1),
}


def rows_of(layer, experts):
    return [each.tensor[each.rows[e]].clone() for each in owned_rows(layer) for e in experts]


def train(layer, optimizer, steps, seed=0):
    for step in range(steps):
        optimizer.zero_grad()
        x = tokens(seed=100 * seed + step)
        (layer(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("AdamW", kind) for kind in KINDS),
        *product(list(OPTIMIZERS)[1:], ["interleaved; biases", "low rank", "residual; biases"]),
    ],
)
def test_twenty_steps_change_no_bit_of_frozen_experts_and_their_routes(name, kind):
    layer = make(kind, noisy=True)
    optimizer = OPTIMIZERS[name](layer.parameters())
    train(layer, optimizer, 2)  # momentum that would go on moving them
    frozen, others = rows_of(layer, [0, 2]), rows_of(layer, [1, 3])
    owned = {id(each.tensor) for each in owned_rows(layer)}
    shared = {n: p.clone() for n, p in layer.experts.named_parameters() if id(p) not in owned}
    with nn.FrozenExperts(optimizer, layer, [2, 0]):
        train(layer, optimizer, 20, seed=1)
    assert all(map(torch.equal, rows_of(layer, [0, 2]), frozen))
    assert all(torch.equal(layer.experts.get_parameter(n), each) for n, each in shared.items())
    moved = [not torch.equal(*pair) for pair in zip(rows_of(layer, [1, 3]), others, strict=True)]
    # An expert of rank 0 has nothing to train but its route.
    assert sum(moved) >= len(moved) - (kind.startswith("low rank") * 10)
    train(layer, optimizer, 1)
    changed = [not torch.equal(*pair) for pair in zip(rows_of(layer, [0, 2]), frozen, strict=True)]
    assert any(changed)
    assert all(each.requires_grad for each in layer.parameters())


@pytest.mark.parametrize("kind", ["interleaved; biases", "hidden", "residual", "stacked"])
def test_a_task_that_was_learned_does_not_suffer_from_a_second_one(kind):
    layer = make(kind)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    x = tokens(count=60)

    def old_loss():
        return (layer(x) - x.flip(1)).square().mean()

    def new_loss():
        return (layer(x) - x.roll(1, 1)).square().mean()

    train(layer, optimizer, 10)
    learned = old_loss().detach()
    old = range(layer.router.num_experts)
    new = nn.add_experts(layer, 4, noise=0.3, rng=0, optimizer=optimizer)
    nn.open_experts(layer)
    nn.close_experts(layer, old)
    before = new_loss().detach()
    with nn.FrozenExperts(optimizer, layer, old):
        for _ in range(20):
            optimizer.zero_grad()
            new_loss().backward()
            optimizer.step()
    assert new_loss() < 0.9 * before
    nn.open_experts(layer, old)
    nn.close_experts(layer, new)
    assert torch.equal(old_loss(), learned)


def test_frozen_experts_keep_their_routes_beside_open_ones_that_train():
    layer, x = make("residual"), tokens(count=100)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    logits = layer.router(x)[0].detach()
    with nn.FrozenExperts(optimizer, layer, [0, 1]):
        train(layer, optimizer, 5)
    after = layer.router(x)[0]
    assert torch.equal(after[:, :2], logits[:, :2])
    assert not torch.equal(after[:, 2:], logits[:, 2:])


def test_frozen_experts_are_followed_under_new_numbers():
    layer = make("interleaved; biases")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    with nn.FrozenExperts(optimizer, layer, [0, 2]) as frozen:
        train(layer, optimizer, 1)
        nn.add_experts(layer, 2, like=0, optimizer=optimizer)
        nn.reorder_experts(layer, [5, 2, 4, 0, 1, 3], optimizer=optimizer)
        assert frozen.experts == [1, 3]
        nn.open_experts(layer)
        kept, others = rows_of(layer, [1, 3]), rows_of(layer, [0, 2])
        train(layer, optimizer, 2, seed=1)
        assert all(map(torch.equal, rows_of(layer, [1, 3]), kept))
        assert not any(map(torch.equal, rows_of(layer, [0, 2]), others))
        nn.remove_experts(layer, [0, 3], optimizer=optimizer)
        assert frozen.experts == [0]
        before = rows_of(layer, [0])
        train(layer, optimizer, 5)
        assert all(map(torch.equal, rows_of(layer, [0]), before))
        with pytest.raises(InputError, match=r"frozen experts do not merge: remove FrozenExperts"):
            nn.merge_experts(layer, [0, 1], optimizer=optimizer)
        nn.merge_experts(layer, [1, 3], optimizer=optimizer)
        assert frozen.experts == [0]
    nn.merge_experts(layer, [0, 1], optimizer=optimizer)


def test_gradients_of_frozen_rows_do_not_count_in_clipping():
    layer = make("stacked; biases")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with nn.FrozenExperts(optimizer, layer, [0, 1, 2]):
        layer(tokens()).square().sum().backward()
        for each in owned_rows(layer):
            for expert in range(3):
                assert not each.tensor.grad[each.rows[expert]].any()
            assert each.tensor.grad[each.rows[3]].any()


def test_gradients_from_before_the_freezing_move_nothing():
    layer = make("interleaved; biases")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(tokens()).square().sum().backward()
    before, center = rows_of(layer, [1]), layer.experts.up.center.clone()
    others = rows_of(layer, [0])
    with nn.FrozenExperts(optimizer, layer, 1):
        optimizer.step()
    assert all(map(torch.equal, rows_of(layer, [1]), before))
    assert torch.equal(layer.experts.up.center, center)
    assert not any(map(torch.equal, rows_of(layer, [0]), others))


def test_load_biases_of_frozen_experts_stay_if_the_balancer_came_first():
    layer = make("stacked", load_bias=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with nn.BiasBalancer(optimizer, layer, rate=0.1), nn.FrozenExperts(optimizer, layer, [0, 3]):
        train(layer, optimizer, 3)
    value = layer.router.load_bias.value
    assert not value[[0, 3]].any()
    assert value[[1, 2]].any()


def test_a_gradient_mask_and_frozen_experts_work_together():
    layer = make("interleaved")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    with nn.GradientMask(optimizer, layer, 0.5) as mask, nn.FrozenExperts(optimizer, layer, 0):
        before = rows_of(layer, [0])
        train(layer, optimizer, 4)
    assert all(map(torch.equal, rows_of(layer, [0]), before))
    assert mask.step == 4


def test_wrong_requests_leave_everything_trainable():
    layer = make("interleaved")
    optimizer = torch.optim.AdamW(layer.parameters())
    other = torch.optim.AdamW(copy.deepcopy(layer).parameters())
    for given, experts, message in (
        (optimizer, [4], "every expert must be an integer from 0 to 3"),
        (optimizer, [0, 0], "each given once"),
        (optimizer, [], "one at least"),
        (optimizer, range(4), "no expert would train: all 4"),
        (other, [0], "the optimizer holds no parameter that experts of the layer own"),
        ("AdamW", [0], "optimizer must be a torch.optim.Optimizer"),
    ):
        with pytest.raises(InputError, match=message):
            nn.FrozenExperts(given, layer, experts)
    assert all(each.requires_grad for each in layer.parameters())
    with nn.FrozenExperts(optimizer, layer, 0) as first:
        with pytest.raises(InputError, match=r"frozen already: remove FrozenExperts\(\[0\] of 4\)"):
            nn.FrozenExperts(optimizer, layer, 1)
        first.remove()
        nn.FrozenExperts(optimizer, layer, 1).remove()
