"""Auxiliary losses of routers: one balances the load of experts, one keeps logits small."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tnmoe.errors import InputError, check_one_of
from tnmoe.nn.routing.counts import count_slots_per_token
from tnmoe.nn.routing.ranks import number_of_ranks, sum_over_ranks
from tnmoe.nn.routing.token_mask import (
    check_token_mask,
    mean_over_tokens,
    token_weights,
    zero_masked,
)
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
    all_ranks: bool = False,
) -> Tensor:
    """Return the sum over experts of load times mean score, scaled to 1 at balance.

    E · Σₑ fₑ Pₑ, where fₑ is the share of the slots, (token, choice) pairs, that chose expert e
    and Pₑ is the expert's mean score. It is differentiable through Pₑ. It reaches E when all
    tokens choose one expert with certainty.

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    top_k_index : Tensor, shape (T, k)
        Experts that tokens chose, before any capacity dropped slots. Index E marks a slot without
        an expert; it is not counted.
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.
    form : {"switch", "gshard"}
        Which slots make the load. ``switch``: all of them (Fedus et al., arXiv:2101.03961,
        equations 4 to 6). ``gshard``: each token's first choice (Lepikhin et al.,
        arXiv:2006.16668, algorithm 1, times E²), for routers whose tokens rank their choices.
    score_function : {"softmax", "sigmoid"}
        The score function of the router. Sigmoids are divided by their sum over the experts
        (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).
    sequences : int
        Number of sequences, all of the same length, that the tokens form one after the other. The
        result is the mean of the sequences' losses, which rewards balance within every sequence.
    all_ranks : bool
        Measure the load of the tokens of all ranks of a distributed run together, not for every
        rank (Qiu et al., arXiv:2501.11873). The mean of the ranks' losses, and of their gradients,
        is then what one process computes of all tokens. For ``sequences=1``.

    Returns
    -------
    Tensor
        Scalar of float32.

    Raises
    ------
    InputError
        If the mask or ``sequences`` does not fit the tokens, a name is unknown, or ``all_ranks`` is
        given with several sequences.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    >>> load_balancing_loss(logits, logits.topk(1).indices)  # all tokens to one of two experts
    tensor(1.9998)
    """
    check_one_of("form", form, BALANCE_FORMS)
    check_one_of("score_function", score_function, SCORE_FUNCTIONS)
    _check_routing(router_logits, top_k_index)
    mask = check_token_mask(attention_mask, len(router_logits))
    weights = token_weights(router_logits, mask, sequences)
    experts = router_logits.shape[-1]
    index = top_k_index[:, :1] if form == "gshard" else top_k_index
    load = mean_over_tokens(count_slots_per_token(index, experts), weights)
    share = _share_of_rank(weights) if all_ranks else 1.0
    if all_ranks:
        load = sum_over_ranks(share * load)
    load = load / load.sum(-1, keepdim=True).clamp(min=1e-9)
    scores = normalized_scores(zero_masked(router_logits, mask), score_function)
    losses = experts * (load * mean_over_tokens(scores, weights)).sum(-1)
    return share * _mean_over_sequences(losses, weights)


def router_z_loss(
    router_logits: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sequences: int = 1,
    all_ranks: bool = False,
) -> Tensor:
    """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, equation 5).

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.
    sequences : int
        Number of sequences, all of the same length, that the tokens form one after the other. The
        result is the mean of the sequences' means.
    all_ranks : bool
        Weigh the tokens of all ranks of a distributed run alike, also where ranks have different
        numbers of them. For ``sequences=1``.

    Returns
    -------
    Tensor
        Scalar of float32.

    Raises
    ------
    InputError
        If the logits do not have two axes, the mask or ``sequences`` does not fit the tokens, or
        ``all_ranks`` is given with several sequences.

    Examples
    --------
    >>> import torch
    >>> round(router_z_loss(torch.zeros(10, 4)).item(), 4)  # log(4)²
    1.9218
    """
    if router_logits.ndim != 2:
        raise InputError(f"expected router_logits (T, E), got {tuple(router_logits.shape)}")
    mask = check_token_mask(attention_mask, len(router_logits))
    weights = token_weights(router_logits, mask, sequences)
    squares = zero_masked(router_logits, mask).float().logsumexp(-1).square()
    share = _share_of_rank(weights) if all_ranks else 1.0
    return share * _mean_over_sequences(mean_over_tokens(squares, weights), weights)


def normalized_scores(router_logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """Return scores (T, E) of float32 that sum to 1 for every token."""
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


def _mean_over_sequences(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of the losses of the sequences in which any token counts."""
    has_tokens = weights.sum(-1).round()
    return (losses * has_tokens).sum() / has_tokens.sum().clamp(min=1)


def _share_of_rank(weights: Tensor) -> Tensor:
    """Return how many tokens of this rank count, over the mean of all ranks."""
    if len(weights) != 1:
        raise InputError(f"all_ranks=True balances one batch, not {len(weights)} sequences")
    tokens = weights.count_nonzero().float()
    return tokens * number_of_ranks() / sum_over_ranks(tokens).clamp(min=1)
