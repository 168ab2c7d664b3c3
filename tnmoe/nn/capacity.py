"""Room for tokens: how many an expert takes, and which of them come first."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from tnmoe.errors import InputError


def check_capacity(name: str, factor: float | None) -> None:
    """Raise an InputError unless the factor is positive and finite, or there is none."""
    if factor is not None and not 0 < factor < inf:
        raise InputError(f"{name} must be positive and finite, or None, got {factor!r}")


def check_mask(token_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask as (T,) of bool; an InputError if it has not as many entries as there are tokens."""
    if token_mask is None:
        return None
    if token_mask.numel() != tokens:
        raise InputError(
            f"the mask must have an entry for each of {tokens} tokens, "
            f"got shape {tuple(token_mask.shape)}"
        )
    return token_mask.reshape(-1) != 0


def room(
    per_token: float, mask: Tensor | None, tokens: int, sequences: int, like: Tensor
) -> Tensor:
    """How many tokens an expert takes of every sequence: ``per_token`` times its length, up.

    Parameters
    ----------
    per_token : float
    mask : Tensor of bool, shape (T,), or None
        Tokens that count.
    tokens, sequences : int
        Tokens T in all, and sequences B of the same length.
    like : Tensor
        Where the result is to be.

    Returns
    -------
    Tensor of float, shape (B,)
        Whole numbers, at least 1.
    """
    # The same arithmetic with and without a mask, so that padding changes nothing.
    precision = torch.float32 if like.device.type == "mps" else torch.float64
    if mask is None:
        lengths = torch.full((sequences,), tokens // sequences, dtype=precision, device=like.device)
    else:
        lengths = mask.view(sequences, -1).sum(1).to(precision)
    return (lengths * per_token).ceil().clamp(min=1)


def first_of_each(index: Tensor, kept: Tensor, capacity: Tensor, num_experts: int) -> Tensor:
    """Which choices are among the first of their expert.

    First choices of all tokens of a sequence come before second ones, then tokens in order.

    Parameters
    ----------
    index : Tensor of int64, shape (T, k)
        Experts chosen.
    kept : Tensor of bool, shape (T, k)
        Choices that count; the others are not among the first, and take no room.
    capacity : Tensor, shape (B,)
        Choices that every expert takes in each of B sequences of the same length.
    num_experts : int

    Returns
    -------
    Tensor of bool, shape (T, k)
    """
    sequences, choices = len(capacity), index.shape[1]

    def by_choice(array: Tensor) -> Tensor:
        return array.view(sequences, -1, choices).mT.reshape(sequences, -1)

    experts = torch.arange(num_experts, device=index.device)
    asked = (by_choice(index)[..., None] == experts) & by_choice(kept)[..., None]
    place = asked.cumsum(1, dtype=torch.int32).gather(-1, by_choice(index)[..., None])[..., 0]
    first = by_choice(kept) & (place <= capacity[:, None])
    return first.view(sequences, choices, -1).mT.reshape(index.shape)
