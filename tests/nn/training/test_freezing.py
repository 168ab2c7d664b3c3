"""Shared cores frozen, or all but the auxiliary ones."""

import pytest
import torch
from torch.nn.utils import parametrize, prune

import tnmoe as tn
from tests.nn.training.small_layer import backward, make_top2_layer
from tnmoe import nn


def test_freezing_leaves_what_experts_own_and_can_be_undone():
    layer = make_top2_layer()
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
    layer = make_top2_layer()
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


@pytest.mark.parametrize("layout", ["hidden", "residual"])
def test_a_linear_module_that_experts_share_is_shared_and_its_bias_is_not(layout):
    up, down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
    layer = nn.MPOMoE.from_dense(up, down, num_experts=4, layout=layout)
    assert {*map(id, nn.shared_parameters(layer))} == {id(up.weight), id(down.weight)}
    assert nn.freeze_shared(layer) == up.weight.numel() + down.weight.numel()
    assert not up.weight.requires_grad
    assert up.bias.requires_grad
    groups = nn.parameter_groups(layer, lr=1.0)
    assert groups[1]["params"] == []  # frozen
    nn.freeze_shared(layer, frozen=False)
    with nn.SharedGradientScale(layer):
        backward(layer)
    scaled = up.weight.grad.clone()
    layer.zero_grad()
    backward(layer)
    torch.testing.assert_close(scaled, up.weight.grad / 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with nn.GradientMask(optimizer, layer, probability=1.0, per_layer=True):
        before = up.weight.detach().clone()
        backward(layer)
        optimizer.step()
    assert torch.equal(up.weight, before)
    nn.train_auxiliary(layer)
    trained = {name for name, each in layer.named_parameters() if each.requires_grad}
    owned = {"aux_0"} if layout == "hidden" else {"delta.center", "delta.aux_0"}
    assert trained == {f"experts.{side}.{name}" for side in ("up", "down") for name in owned}


def test_auxiliary_cores_are_trained_through_their_parametrizations():
    layer = make_top2_layer()
    up = layer.experts.up
    parametrize.register_parametrization(up, "aux_0", torch.nn.Tanh())
    prune.l1_unstructured(up, "aux_1", amount=0.3)
    nn.train_auxiliary(layer)
    assert up.parametrizations["aux_0"].original.requires_grad
    assert up.get_parameter("aux_1_orig").requires_grad
    assert not layer.experts.up.center.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.train_auxiliary(torch.nn.Linear(2, 2)), "Linear has no core that"),
        (
            lambda: nn.train_auxiliary(make_top2_layer(), also=["router", "head"]),
            "no parameter has head in its name",
        ),
        (lambda: nn.freeze_shared(nn.DenseExperts(2, 8, 8)), "DenseExperts has no core that"),
        (
            lambda: nn.freeze_shared(nn.MPOExperts(2, 8, 8, shared_sites="none")),
            "has no core that",
        ),
    ],
)
def test_what_cannot_be_frozen_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
