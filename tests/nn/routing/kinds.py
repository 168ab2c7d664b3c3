"""Routers of every kind, for tests."""

import torch

from tnmoe import nn

H, E, NO_EXPERT = 8, 6, 6


def as_matrix(weights, index, experts=E):
    """Weight of every expert for every token, (T, E): the same whatever the order of choices."""
    dense = torch.zeros(len(index), experts + 1, dtype=weights.dtype)
    return dense.scatter_add(1, index, weights)[:, :experts]


def all_kinds(**common):
    return {
        "switch": nn.TopKRouter(H, E, normalize=False, capacity_factor=1.0, **common),
        "top-1": nn.TopKRouter(H, E, **common),
        "gshard": nn.TopKRouter(H, E, 2, second_expert="random", capacity_factor=1.0, **common),
        "shazeer": nn.TopKRouter(H, E, 3, noisy=True, **common),
        "deepseek": nn.TopKRouter(
            H,
            E,
            3,
            score_function="sigmoid",
            load_bias=True,
            num_groups=3,
            top_groups=2,
            scale=2.5,
            **common,
        ),
        "sigmoid, not normalised": nn.TopKRouter(
            H, E, 2, score_function="sigmoid", normalize=False, **common
        ),
        "expert choice": nn.ExpertChoiceRouter(H, E, **common),
        "expert choice, sigmoid": nn.ExpertChoiceRouter(
            H, E, 1.5, score_function="sigmoid", normalize=False, **common
        ),
    }


KINDS = tuple(all_kinds())
