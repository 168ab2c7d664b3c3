"""Cores that projections have in common are contracted once."""

import pytest
import torch

import tnmoe as tn
from tests.nn.compute.cases import experts, routing
from tnmoe.nn import Experts, MPOProjection
from tnmoe.nn.compute import joint as joint_module


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_cores_that_gate_and_up_share_are_applied_once_and_get_the_gradients_of_both(
    layout, monkeypatch
):
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


@pytest.mark.parametrize("tied", [1, 2])
def test_cores_that_gate_and_up_share_act_once_per_token_and_once_for_both(tied, monkeypatch):
    shape = tn.MPOShape((2, 3, 2), (2, 2, 3))
    up, gate = (MPOProjection(3, shape, shared_sites={1, 2}) for _ in range(2))
    down = MPOProjection(3, tn.MPOShape((2, 2, 3), (2, 3, 2)), shared_sites={0})
    layer = Experts(up, down, gate, activation="silu").double()
    for projection in (up, gate, down):
        projection.route = "joint"
    for site in range(3 - tied, 3):
        gate.set_core(site, up.core_at(site))
    rows = []
    multiply = joint_module._multiply
    monkeypatch.setattr(
        joint_module, "_multiply", lambda state, *rest: rows.append(state) or multiply(state, *rest)
    )
    states, index = torch.randn(5, 12).double(), torch.rand(5, 3).topk(2).indices
    weights = torch.rand(5, 2).double()
    output = layer(states, index, weights)
    # Per token: two sites of up, those of gate that are its own, one of down. Per slot: the rest.
    assert len(rows) == (2 + 2 - tied + 1) + (1 + 1 + 2)
    up_matrices, gate_matrices, down_matrices = (each.weight() for each in (up, gate, down))
    expected = torch.zeros_like(states)
    for token in range(5):
        for expert, weight in zip(index[token], weights[token], strict=True):
            inner = torch.nn.functional.silu(gate_matrices[expert] @ states[token])
            inner = inner * (up_matrices[expert] @ states[token])
            expected[token] += weight * (down_matrices[expert] @ inner)
    torch.testing.assert_close(output, expected)
