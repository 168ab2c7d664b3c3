"""Auxiliary losses that keep a router's choices spread and its scores small."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tnmoe.errors import InputError, one_of, positive_int
from tnmoe.nn.routing.capacity import check_mask
from tnmoe.nn.routing.counts import choices_per_token
from tnmoe.nn.transforms import values_are_readable
from tnmoe.options import BALANCE_FORMS, SCORE_FUNCTIONS, BalanceForm, ScoreFunction


def load_balancing_loss(
    router_logits: Tensor,
    top_k_index: Tensor,
    attention_mask: Tensor | None = None,
    *,
    form: BalanceForm = "switch",
    score_function: ScoreFunction = "softmax",
    sequences: int = 1,
) -> Tensor:
    """Product of each expert's load and mean score, summed and scaled to 1 at balance.

    E · Σₑ fₑ Pₑ with fₑ the share of the choices that expert e got and Pₑ its mean score. It is
    differentiable through Pₑ and reaches E when all tokens choose one expert with certainty.

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    top_k_index : Tensor, shape (T, k)
        Experts that tokens chose, whether or not these had room; E counts for none.
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.
    form : {"switch", "gshard"}
        Which choices make the load: all k (Fedus et al., arXiv:2101.03961, equations 4 to 6), or
        each token's first (Lepikhin et al., arXiv:2006.16668, algorithm 1, times E²), where tokens
        choose in an order.
    score_function : {"softmax", "sigmoid"}
        The router's. Sigmoids are divided by their sum over experts (DeepSeek-V3,
        arXiv:2412.19437, equations 17 to 20).
    sequences : int
        The tokens are so many sequences of the same length, one after the other. The loss is
        taken of each, which asks for balance within every one, and averaged.

    Returns
    -------
    Tensor
        Scalar of float32.

    Raises
    ------
    InputError
        If the mask or ``sequences`` does not fit the tokens, or a name is unknown.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    >>> load_balancing_loss(logits, logits.topk(1).indices)  # all tokens to one of two experts
    tensor(1.9998)
    """
    one_of("form", form, BALANCE_FORMS)
    one_of("score_function", score_function, SCORE_FUNCTIONS)
    _check_routing(router_logits, top_k_index)
    router_logits = counted_logits(router_logits, attention_mask)
    experts = router_logits.shape[-1]
    index = top_k_index[:, :1] if form == "gshard" else top_k_index
    weights = _token_weights(router_logits, attention_mask, sequences)

    def mean(values: Tensor) -> Tensor:
        # No matrix product, which autocast would do in half precision.
        return (weights[..., None] * values.view(*weights.shape, experts)).sum(1)

    load = mean(choices_per_token(index, experts))
    load = load / load.sum(-1, keepdim=True).clamp(min=1e-9)
    losses = experts * (load * mean(normalized_scores(router_logits, score_function))).sum(-1)
    return _over_sequences(losses, weights)


def router_z_loss(
    router_logits: Tensor, attention_mask: Tensor | None = None, *, sequences: int = 1
) -> Tensor:
    """Mean squared log-sum-exp of the scores (ST-MoE, arXiv:2202.08906, equation 5).

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.
    sequences : int
        The tokens are so many sequences of the same length, one after the other; the means of
        each are averaged.

    Returns
    -------
    Tensor
        Scalar of float32.

    Raises
    ------
    InputError
        If the logits are no table, the mask has another size, or the tokens are not so many
        sequences of one length.

    Examples
    --------
    >>> import torch
    >>> round(router_z_loss(torch.zeros(10, 4)).item(), 4)  # log(4)²
    1.9218
    """
    if router_logits.ndim != 2:
        raise InputError(f"expected router_logits (T, E), got {tuple(router_logits.shape)}")
    router_logits = counted_logits(router_logits, attention_mask)
    squares = router_logits.float().logsumexp(-1).square()
    weights = _token_weights(router_logits, attention_mask, sequences)
    return _over_sequences((weights * squares.view_as(weights)).sum(-1), weights)


def counted_logits(router_logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Logits (T, E), zeros for tokens that do not count: a weight of 0 would let their NaN pass."""
    mask = check_mask(attention_mask, len(router_logits))
    return router_logits if mask is None else router_logits.masked_fill(~mask[:, None], 0)


def normalized_scores(router_logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """Scores (T, E) of float32, each token's summing to 1."""
    if score_function == "sigmoid":
        return F.logsigmoid(router_logits.float()).softmax(-1)
    return router_logits.float().softmax(-1)


def _check_routing(router_logits: Tensor, index: Tensor) -> None:
    fits = router_logits.ndim == index.ndim == 2 and len(index) == len(router_logits)
    if not fits or index.is_floating_point():
        raise InputError(
            f"expected router_logits (T, E) and top_k_index (T, k) of integers, got "
            f"{tuple(router_logits.shape)} and {tuple(index.shape)} of {index.dtype}"
        )
    experts = router_logits.shape[-1]
    if (
        values_are_readable(index)
        and index.numel()
        and not 0 <= index.min() <= index.max() <= experts
    ):
        raise InputError(
            f"top_k_index must hold experts from 0 to {experts - 1}, or {experts} for none, got "
            f"{index.min()} to {index.max()}"
        )


def _token_weights(tokens: Tensor, attention_mask: Tensor | None, sequences: int) -> Tensor:
    """Weights of a mean over the tokens of every sequence that count, shape (B, T / B)."""
    if len(tokens) % positive_int("sequences", sequences):
        raise InputError(f"{len(tokens)} tokens are not {sequences} sequences of the same length")
    mask = check_mask(attention_mask, len(tokens))
    counts = tokens.new_ones(len(tokens)).float() if mask is None else mask.float()
    counts = counts.view(sequences, -1)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def _over_sequences(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean over the sequences that have a token that counts."""
    present = weights.sum(-1).round()
    return (losses * present).sum() / present.sum().clamp(min=1)
