"""Small layers and a step of their training, for tests."""

import torch

from tnmoe import nn


def make_layer(experts=2, top_k=1) -> nn.MPOMoE:
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, experts, top_k), nn.MPOExperts(experts, 8, 12, sites=3))


def make_top2_layer(experts=4) -> nn.MPOMoE:
    return make_layer(experts, top_k=2)


def loss_of(layer, step):
    generator = torch.Generator().manual_seed(step)
    return layer(torch.randn(6, 8, generator=generator)).square().sum()


def backward(layer) -> None:
    loss_of(layer, step=0).backward()


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
