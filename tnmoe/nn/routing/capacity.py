"""Capacity: how many slots an expert accepts, and which slots those are."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_lengths(mask: Tensor | None, rows: Tensor, sequences: int) -> Tensor:
    """Count the tokens of every sequence, without padding.

    Parameters
    ----------
    mask : Tensor of bool, shape (T,), or None
        Tokens that count.
    rows : Tensor, shape (T, …)
        A row per token, the sequences one after the other.
    sequences : int
        Number of sequences B, all of the same length.

    Returns
    -------
    Tensor of float64 (float32 on MPS, which has no float64), shape (B,)
        On the device of ``rows``.
    """
    precision = torch.float32 if rows.device.type == "mps" else torch.float64
    if mask is None:
        length = rows.shape[0] // sequences
        return torch.full((sequences,), length, dtype=precision, device=rows.device)
    return mask.view(sequences, -1).sum(1).to(precision)


def expert_capacity(factor: float, num_experts: int, lengths: Tensor) -> Tensor:
    """Return how many slots an expert accepts of every sequence: factor · length / E, rounded up.

    Parameters
    ----------
    factor : float
        Slots per token on average over all experts.
    num_experts : int
        Number of experts E.
    lengths : Tensor of float, shape (B,)
        As :func:`sequence_lengths` returns them, so that padding does not change the arithmetic.

    Returns
    -------
    Tensor of float, shape (B,)
        Whole numbers, at least 1.

    Examples
    --------
    >>> expert_capacity(1.25, 4, torch.tensor([10.0, 1.0]))
    tensor([4., 1.])
    """
    return (lengths * factor / num_experts).ceil().clamp(min=1)


def slots_within_capacity(
    index: Tensor, kept: Tensor, capacity: Tensor, num_experts: int
) -> Tensor:
    """Return which slots their experts accept.

    An expert accepts the first choices of all tokens of a sequence before the second ones, and
    equal choices in the order of the tokens.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Expert of every slot.
    kept : Tensor of bool, shape (T, k)
        Slots that apply. Where it is False a slot is not accepted and uses no capacity.
    capacity : Tensor, shape (B,)
        Slots that every expert accepts in each of B sequences of the same length.
    num_experts : int
        Number of experts E.

    Returns
    -------
    Tensor of bool, shape (T, k)
    """
    sequences, choices = capacity.shape[0], index.shape[1]

    def by_choice(array: Tensor) -> Tensor:
        return array.view(sequences, -1, choices).mT.reshape(sequences, -1)

    # A stable sort puts the slots of an expert side by side, in their order of priority.
    experts, order = torch.where(by_choice(kept), by_choice(index), num_experts).sort(stable=True)
    first = torch.searchsorted(experts, experts)
    rank = torch.arange(experts.shape[1], device=index.device) - first
    accepted_sorted = (rank < capacity[:, None]) & (experts < num_experts)
    accepted = torch.zeros_like(accepted_sorted).scatter(1, order, accepted_sorted)
    return accepted.view(sequences, choices, -1).mT.reshape(index.shape)
