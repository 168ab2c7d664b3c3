"""A small layer and a step of its training, for tests."""

import torch

from tnmoe import nn


def make_layer() -> nn.MPOMoE:
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, 2), nn.MPOExperts(2, 8, 12, sites=3))


def loss_of(layer, step):
    generator = torch.Generator().manual_seed(step)
    return layer(torch.randn(6, 8, generator=generator)).square().sum()


def train_step(layer, optimizer, step, closure=False) -> None:
    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(layer, step)
        loss.backward()
        return loss

    if closure == "keyword":
        optimizer.step(closure=evaluate)
    elif closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def centers_and_others(layer):
    centers = nn.shared_parameters(layer)
    return centers, [p for p in layer.parameters() if all(p is not c for c in centers)]
