"""Objects print as one short line, however much they hold."""

import re

import numpy as np
import pytest
import torch

import tnmoe as tn
from tnmoe import backends, nn

SHAPE = tn.MPOShape((4, 4, 4), (4, 4, 4))
MPO = tn.MPO.random(SHAPE, 8, rng=0, like=torch.zeros(()))


def layer():
    return nn.MPOMoE(nn.TopKRouter(64, 4, top_k=2, load_bias=True), nn.MPOExperts(4, 64, 64))


def routed(calls=1):
    model = torch.nn.ModuleList([layer() for _ in range(calls)])
    with nn.record_routing(model) as routing:
        for each in model:
            each(torch.randn(2, 500, 64))
    return routing


def history():
    result = nn.RoutingHistory()
    result.append(routed(2))
    return result


def masked(kind):
    model = layer()
    if kind is nn.AutogradMask:
        return kind(model, 0.5)
    return kind(torch.optim.SGD(model.parameters(), lr=0.1), model, probability=0.5)


def balancer():
    model = layer()
    return nn.BiasBalancer(torch.optim.SGD(model.parameters(), lr=0.1), model)


OBJECTS = {
    "MPO(64×64, ": lambda: MPO,
    "SharedMPO(3 × 64×64, ": lambda: tn.SharedMPO.replicate(MPO, 3),
    "SharedMPO(8 × 64×64, ": lambda: tn.SharedMPO.from_base(MPO, 8),
    "TruncationInfo(discarded=": lambda: MPO.compress(max_bond=2, return_info=True)[1],
    "FitInfo(error=0.": lambda: tn.fit(MPO, max_bond=2, return_info=True)[1],
    "SqueezeResult(score=1, steps=9, ": lambda: tn.squeeze(
        {"w": MPO}, lambda mpos: 1.0, 0.5, max_steps=9
    ),
    "ContractionPlan(route=": lambda: tn.contraction_plan(SHAPE, batch=8, experts=4),
    "Routing(calls=1, tokens=1000, routers=['0.router'])": routed,
    "Routing(calls=5, tokens=5000, ": lambda: routed(5),
    "RoutingCall('0.router', tokens=1000, experts=4, choices=2, ": lambda: routed().calls[0],
    "RoutingHistory(steps=1, routers=['0.router', '1.router'])": history,
    "Groups(offsets=": lambda: nn.Groups.of(torch.randint(4, (1000,)), 4),
    "GradientMask(probability=0.5, ": lambda: masked(nn.GradientMask),
    "AutogradMask(probability=0.5, ": lambda: masked(nn.AutogradMask),
    "SharedGradientScale(scale=None, tensors=2)": lambda: nn.SharedGradientScale(layer()),
    "BiasBalancer(rate=0.001, routers=1)": balancer,
    "WeightCache(limit=8, used=0, enabled=True)": lambda: nn.WeightCache(8),
    "<backend of numpy>": lambda: backends.get_backend(np.ones(2)),
    "<backend of torch>": lambda: backends.get_backend(torch.ones(2)),
}


@pytest.mark.parametrize("beginning", OBJECTS)
def test_an_object_prints_as_a_short_line_without_tensors_or_addresses(beginning):
    text = repr(OBJECTS[beginning]())
    assert text.startswith(beginning)
    assert len(text) <= 200
    assert "\n" not in text
    assert not re.search("0x[0-9a-f]{6}|tensor\\(\\[\\[", text)


def test_an_empty_recording_prints():
    assert repr(nn.Routing()) == "Routing(calls=0, tokens=0, routers=[])"
    assert repr(nn.RoutingHistory()) == "RoutingHistory(steps=0, routers=[])"
    assert repr(tn.FitInfo((), True)) == "FitInfo(error=None, sweeps=0, converged=True)"
