"""Masks of tokens: which tokens count, and means over those that do."""

from __future__ import annotations

from torch import Tensor

from tnmoe.errors import InputError, check_positive_int
from tnmoe.nn.transforms import values_are_readable


def check_token_mask(token_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return a mask of tokens as (T,) of bool; None where no mask was given.

    Parameters
    ----------
    token_mask : Tensor of T entries, any shape, or None
        Tokens where it is 0 do not count.
    tokens : int
        Number of tokens T.

    Raises
    ------
    InputError
        If the mask does not have T entries or holds negative numbers.
    """
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
            "the mask must be 0 where a token is padding, got negative numbers: a mask that is "
            "added to attention scores means the opposite"
        )
    return token_mask.reshape(-1) != 0


def zero_masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows (T, …) with zeros for the tokens that do not count.

    Weights of 0 would let NaN through.
    """
    return rows if mask is None else rows.masked_fill(~mask[:, None], 0)


def token_weights(rows: Tensor, mask: Tensor | None, sequences: int = 1) -> Tensor:
    """Return the weights of a mean over the tokens of every sequence that count.

    Parameters
    ----------
    rows : Tensor, shape (T, …)
        A row per token, the sequences one after the other.
    mask : Tensor of bool, shape (T,), or None
        Tokens that count.
    sequences : int
        Number of sequences B, all of the same length.

    Returns
    -------
    Tensor of float32, shape (B, T / B)
        Each row sums to 1, or to 0 where none of the sequence's tokens counts.

    Raises
    ------
    InputError
        If T tokens are not B sequences of the same length.
    """
    tokens = len(rows)
    if tokens % check_positive_int("sequences", sequences):
        raise InputError(f"{tokens} tokens are not {sequences} sequences of the same length")
    counts = rows.new_ones(tokens).float() if mask is None else mask.float()
    counts = counts.view(sequences, -1)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def mean_over_tokens(rows: Tensor, weights: Tensor) -> Tensor:
    """Return weighted means over the tokens of every sequence.

    Parameters
    ----------
    rows : Tensor, shape (T, …)
    weights : Tensor, shape (B, T / B)
        As :func:`token_weights` returns them.

    Returns
    -------
    Tensor, shape (B, …)
    """
    by_sequence = rows.reshape(*weights.shape, *rows.shape[1:])
    # No matrix product: autocast would compute it in half precision.
    return (weights.view(*weights.shape, *[1] * (rows.ndim - 1)) * by_sequence).sum(1)
