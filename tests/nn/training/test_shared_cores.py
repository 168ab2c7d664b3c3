"""The simpler cures for shared tensors that are updated too much."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import tnmoe as tn
from tests.nn.ranks import on_two_ranks
from tnmoe import nn
from tnmoe.nn.compute import cache


def make(experts=4):
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, experts, 2), nn.MPOExperts(experts, 8, 12, sites=3))


def tied(*experts):
    layers = torch.nn.ModuleList(make(each) for each in experts)
    nn.tie_layers(layers)
    return layers


def backward(layer):
    layer(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()


def test_parameter_groups_hold_every_trained_parameter_once_and_shared_ones_apart():
    layer = make()
    layer.router.weight.requires_grad_(False)
    own, shared = nn.parameter_groups(layer, lr=0.1, weight_decay=0.01)
    assert own["lr"] == 0.1
    assert shared["lr"] == pytest.approx(0.1 / 4)
    assert own["weight_decay"] == shared["weight_decay"] == 0.01
    assert {id(each) for each in shared["params"]} == {
        id(layer.experts.up.center),
        id(layer.experts.down.center),
    }
    both = [id(each) for each in (*own["params"], *shared["params"])]
    trained = [id(each) for each in layer.parameters() if each.requires_grad]
    assert sorted(both) == sorted(trained)
    optimizer = torch.optim.SGD(nn.parameter_groups(layer, lr=0.1, shared_scale=0.5))
    backward(layer)
    core = layer.experts.up.center
    expected = core.detach() - 0.05 * core.grad
    optimizer.step()
    torch.testing.assert_close(core.detach(), expected)


@pytest.mark.parametrize("scale", [None, 0.5, 0.0])
def test_gradients_of_shared_tensors_are_scaled_and_no_others_until_removed(scale):
    plain, scaled = make(), make()
    backward(plain)
    with nn.SharedGradientScale(scaled, scale):
        backward(scaled)
    shared = {name for name, _ in scaled.named_parameters() if name.endswith("center")}
    grads = dict(plain.named_parameters())
    for name, each in scaled.named_parameters():
        factor = (0.25 if scale is None else scale) if name in shared else 1
        torch.testing.assert_close(each.grad, grads[name].grad * factor)
    scaled.zero_grad()
    backward(scaled)
    torch.testing.assert_close(scaled.experts.up.center.grad, plain.experts.up.center.grad)


def test_freezing_leaves_what_experts_own_and_can_be_undone():
    layer = make()
    frozen = nn.freeze_shared(layer)
    assert frozen == layer.experts.up.center.numel() + layer.experts.down.center.numel()
    backward(layer)
    for name, each in layer.named_parameters():
        assert (each.grad is None) == name.endswith("center")
    with nn.SharedGradientScale(layer):
        pass  # nothing to scale
    nn.freeze_shared(layer, frozen=False)
    assert all(each.requires_grad for each in layer.parameters())


def test_auxiliary_cores_alone_are_trained_and_what_else_is_named():
    layer = make()
    count = nn.train_auxiliary(layer)
    trained = {name for name, each in layer.named_parameters() if each.requires_grad}
    assert trained == {f"experts.{side}.aux_{site}" for side in ("up", "down") for site in (0, 1)}
    assert count == sum(each.numel() for each in layer.parameters() if each.requires_grad)
    more = nn.train_auxiliary(layer, also=["router"])
    assert more == count + layer.router.weight.numel()
    assert nn.train_auxiliary(layer, also="router") == more
    other = nn.MPOExperts(4, 8, 12, sites=3, shared_sites={"up": (0, 1), "down": (0, 2)})
    nn.train_auxiliary(other)
    trained = {name for name, each in other.named_parameters() if each.requires_grad}
    assert trained == {"up.aux_1", "down.center"}


def test_tensors_thawed_later_are_scaled_too():
    plain, scaled = make(), make()
    nn.freeze_shared(scaled)
    with nn.SharedGradientScale(scaled, 0.5):
        assert not scaled.experts.up.center.requires_grad
        nn.freeze_shared(scaled, frozen=False)
        backward(scaled)
    backward(plain)
    torch.testing.assert_close(scaled.experts.up.center.grad, plain.experts.up.center.grad * 0.5)


def test_auxiliary_cores_are_trained_through_their_parametrizations():
    layer = make()
    up = layer.experts.up
    parametrize.register_parametrization(up, "aux_0", torch.nn.Tanh())
    prune.l1_unstructured(up, "aux_1", amount=0.3)
    nn.train_auxiliary(layer)
    assert up.parametrizations["aux_0"].original.requires_grad
    assert up.get_parameter("aux_1_orig").requires_grad
    assert not layer.experts.up.center.requires_grad


def _scale_sharded(rank):
    """Gradients and a step of a layer under FSDP, with scaled gradients, against one process."""
    plain, sharded = make(), make()
    with nn.SharedGradientScale(plain, 0.5):
        backward(plain)
    fully_shard(sharded)
    scale = nn.SharedGradientScale(sharded, 0.5)
    differences = []
    for _ in range(2):  # hooked once, however often it goes forward
        sharded.zero_grad()
        backward(sharded)
        differences += [
            float((one.grad.full_tensor() - two.grad).abs().max())
            for one, two in zip(sharded.parameters(), plain.parameters(), strict=True)
        ]
    scale.remove()
    plain.zero_grad()
    sharded.zero_grad()
    backward(plain)
    backward(sharded)
    differences += [
        float((one.grad.full_tensor() - two.grad).abs().max())
        for one, two in zip(sharded.parameters(), plain.parameters(), strict=True)
    ]
    return max(differences)


def test_gradients_that_fsdp_gathers_are_scaled():
    assert max(on_two_ranks(_scale_sharded)) < 1e-5


def _evaluate_sharded(rank):
    """Evaluation after a step under FSDP; nothing looks at the numbers, as on an accelerator."""
    cache._samples_of = lambda cores: []
    plain, sharded = make(), make()
    fully_shard(sharded)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (plain, sharded)]
    for layer in (plain, sharded):
        for name in ("up", "down"):
            getattr(layer.experts, name).route = "cached"
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    differences = []
    for _ in range(3):
        with torch.no_grad():
            cache.weight_cache.clear()
            outputs = sharded(states)
            kept = cache.weight_cache.used
            differences.append(float((outputs - plain(states)).abs().max()) + kept)
        for layer, optimizer in zip((plain, sharded), optimizers, strict=True):
            for each in (layer.experts.up, layer.experts.down):
                each.route = "rebuilt"
            optimizer.zero_grad()
            backward(layer)
            optimizer.step()
            for each in (layer.experts.up, layer.experts.down):
                each.route = "cached"
    return max(differences)


def test_matrices_of_cores_that_fsdp_gathers_are_not_kept():
    assert max(on_two_ranks(_evaluate_sharded)) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.train_auxiliary(torch.nn.Linear(2, 2)), "Linear has no tensor that"),
        (
            lambda: nn.train_auxiliary(make(), also=["router", "head"]),
            "no parameter has head in its name",
        ),
        (lambda: nn.parameter_groups(torch.nn.Linear(2, 2), 0.1), "Linear has no tensor that"),
        (lambda: nn.SharedGradientScale(torch.nn.Linear(2, 2)), "Linear has no tensor that"),
        (lambda: nn.freeze_shared(nn.DenseExperts(2, 8, 8)), "DenseExperts has no tensor that"),
        (
            lambda: nn.freeze_shared(nn.MPOExperts(2, 8, 8, shared_sites="none")),
            "has no tensor that",
        ),
        (
            lambda: nn.parameter_groups(make(), 0.1, -1.0),
            r"shared_scale must be in \[0, inf\), got -1.0",
        ),
        (
            lambda: nn.SharedGradientScale(make(), float("nan")),
            r"scale must be in \[0, inf\), got nan",
        ),
        (
            lambda: nn.parameter_groups(torch.nn.ModuleList([make(4), make(2)]), 0.1),
            r"give shared_scale: layers have \[2, 4\] experts",
        ),
        (lambda: nn.SharedGradientScale(tied(4, 2)), "give scale: layers that share a tensor"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
