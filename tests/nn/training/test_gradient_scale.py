"""Gradients of shared cores, scaled."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import tnmoe as tn
from tests.nn.ranks import on_two_ranks
from tests.nn.training.small_layer import backward, make_top2_layer
from tnmoe import nn


def tied(*experts):
    layers = torch.nn.ModuleList(make_top2_layer(each) for each in experts)
    nn.tie_layers(layers)
    return layers


@pytest.mark.parametrize("scale", [None, 0.5, 0.0])
def test_gradients_of_shared_cores_are_scaled_and_no_others_until_removed(scale):
    plain, scaled = make_top2_layer(), make_top2_layer()
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


def test_tensors_thawed_later_are_scaled_too():
    plain, scaled = make_top2_layer(), make_top2_layer()
    nn.freeze_shared(scaled)
    with nn.SharedGradientScale(scaled, 0.5):
        assert not scaled.experts.up.center.requires_grad
        nn.freeze_shared(scaled, frozen=False)
        backward(scaled)
    backward(plain)
    torch.testing.assert_close(scaled.experts.up.center.grad, plain.experts.up.center.grad * 0.5)


def _scale_sharded(rank):
    """Gradients and a step of a layer under FSDP, with scaled gradients, against one process."""
    plain, sharded = make_top2_layer(), make_top2_layer()
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


@pytest.mark.slow
def test_gradients_that_fsdp_gathers_are_scaled():
    assert max(on_two_ranks(_scale_sharded)) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.SharedGradientScale(torch.nn.Linear(2, 2)), "Linear has no core that"),
        (
            lambda: nn.SharedGradientScale(make_top2_layer(), float("nan")),
            r"scale must be in \[0, inf\), got nan",
        ),
        (lambda: nn.SharedGradientScale(tied(4, 2)), "give scale: layers that share a core"),
    ],
)
def test_bad_scales_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
