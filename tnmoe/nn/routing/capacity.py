"""Room for tokens: how many an expert takes, and which of them come first."""

from __future__ import annotations

import torch
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.nn.transforms import values_are_readable


def check_mask(token_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask as (T,) of bool; an InputError if it has not as many entries as there are tokens."""
    if token_mask is None:
        return None
    if not isinstance(token_mask, Tensor) or token_mask.numel() != tokens:
        given = getattr(token_mask, "shape", None)
        raise InputError(
            f"the mask must be a tensor with an entry for each of {tokens} tokens, got "
            + (repr(token_mask) if given is None else f"shape {tuple(given)}")
        )
    if (
        token_mask.is_floating_point()
        and values_are_readable(token_mask)
        and (token_mask < 0).any()
    ):
        raise InputError(
            "the mask must be 0 where a token is padding, got negative numbers: one "
            "that is added to attention scores says the opposite"
        )
    return token_mask.reshape(-1) != 0


def room(
    factor: float, experts: int, mask: Tensor | None, tokens: int, sequences: int, like: Tensor
) -> Tensor:
    """How many tokens an expert takes of every sequence: factor · length / E, rounded up.

    Parameters
    ----------
    factor : float
    experts : int
        Number of experts E.
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
    return (lengths * factor / experts).ceil().clamp(min=1)


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
    sequences, choices = capacity.shape[0], index.shape[1]

    def by_choice(array: Tensor) -> Tensor:
        return array.view(sequences, -1, choices).mT.reshape(sequences, -1)

    # Sorted, the choices of an expert are a run, in the order in which they came.
    experts, order = torch.where(by_choice(kept), by_choice(index), num_experts).sort(stable=True)
    place = torch.arange(experts.shape[1], device=index.device) - torch.searchsorted(
        experts, experts
    )
    among_first = (place < capacity[:, None]) & (experts < num_experts)
    first = torch.zeros_like(among_first).scatter(1, order, among_first)
    return first.view(sequences, choices, -1).mT.reshape(index.shape)
