"""Cores that projections have in common are contracted once."""

import pytest
import torch

from tests.nn.compute.cases import experts, routing


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_cores_that_gate_and_up_share_are_applied_once_and_get_the_gradients_of_both(
    layout, monkeypatch
):
    from tnmoe.nn.compute import joint as joint_module

    layer, tied = experts("joint", torch.float64, layout=layout), []
    layer.gate.set_core(layer.up.shape.sites - 1, layer.up.aux[-1])
    products = []
    multiply = joint_module._multiply
    monkeypatch.setattr(joint_module, "_multiply", lambda *a: products.append(a) or multiply(*a))
    states, index, weights = (
        each.double() if each.is_floating_point() else each for each in routing()
    )
    for route in ("joint", "rebuilt"):
        for module in (layer.up, layer.gate, layer.down):
            module.route = route
        layer.zero_grad()
        out = layer(states, index, weights)
        out.square().sum().backward()
        tied.append([out.detach(), *(each.grad.clone() for each in layer.parameters())])
    assert len(products) == 3 * layer.up.shape.sites - 1
    for ours, theirs in zip(*tied, strict=True):
        torch.testing.assert_close(ours, theirs)
