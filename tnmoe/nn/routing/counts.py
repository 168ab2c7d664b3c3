"""Tokens' choices of experts, counted without a table of all choices and all experts."""

from __future__ import annotations

import torch
from torch import Tensor


def choices_per_token(index: Tensor, num_experts: int) -> Tensor:
    """How often tokens chose each expert.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Experts from 0 to E − 1; E for none.
    num_experts : int
        Number of experts E.

    Returns
    -------
    Tensor of float32, shape (T, E)

    Examples
    --------
    >>> choices_per_token(torch.tensor([[0, 2], [1, 3]]), num_experts=3)
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    ones = torch.ones_like(index, dtype=torch.float32)
    counts = ones.new_zeros(*index.shape[:-1], num_experts + 1)
    return counts.scatter_add(-1, index, ones)[..., :num_experts]


def choices_per_expert(index: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    """How many choices of all tokens each expert got.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Experts from 0 to E − 1; E for none.
    mask : Tensor of bool, shape (T,), or None
        Tokens where it is False do not count.
    num_experts : int
        Number of experts E.

    Returns
    -------
    Tensor of int64, shape (E,)

    Examples
    --------
    >>> choices_per_expert(torch.tensor([[0, 2], [1, 2]]), mask=None, num_experts=3)
    tensor([1, 1, 2])
    """
    counted = torch.ones_like(index) if mask is None else mask[:, None].expand_as(index).long()
    counts = counted.new_zeros(num_experts + 1)
    return counts.scatter_add(0, index.flatten(), counted.flatten())[:num_experts]
