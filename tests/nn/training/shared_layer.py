"""A small layer of experts that share cores, for tests."""

import torch

from tnmoe import nn


def make(experts=4):
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, experts, 2), nn.MPOExperts(experts, 8, 12, sites=3))


def backward(layer):
    layer(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
