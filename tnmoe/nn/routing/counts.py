"""Counts of slots, made without a table of all slots and all experts.

A slot is a (token, choice) pair: with top_k = 2 every token has two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_slots_per_token(index: Tensor, num_experts: int) -> Tensor:
    """Count every token's slots by expert.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Expert of every slot, from 0 to E − 1. Index E marks a slot without an expert; it is not
        counted.
    num_experts : int
        Number of experts E.

    Returns
    -------
    Tensor of float32, shape (T, E)

    Examples
    --------
    >>> count_slots_per_token(torch.tensor([[0, 2], [1, 3]]), num_experts=3)
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    ones = torch.ones_like(index, dtype=torch.float32)
    counts = ones.new_zeros(*index.shape[:-1], num_experts + 1)
    return counts.scatter_add(-1, index, ones)[..., :num_experts]


def count_slots_per_expert(index: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    """Count the slots of all tokens by expert.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Expert of every slot, from 0 to E − 1. Index E marks a slot without an expert; it is not
        counted.
    mask : Tensor of bool, shape (T,), or None
        Tokens where it is False do not count.
    num_experts : int
        Number of experts E.

    Returns
    -------
    Tensor of int64, shape (E,)

    Examples
    --------
    >>> count_slots_per_expert(torch.tensor([[0, 2], [1, 2]]), mask=None, num_experts=3)
    tensor([1, 1, 2])
    """
    counted = torch.ones_like(index) if mask is None else mask[:, None].expand_as(index).long()
    counts = counted.new_zeros(num_experts + 1)
    return counts.scatter_add(0, index.flatten(), counted.flatten())[:num_experts]
