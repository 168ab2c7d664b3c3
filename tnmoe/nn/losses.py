"""Auxiliary losses that keep a router's choices spread and its scores small."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(
    router_logits: Tensor, top_k_index: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Product of each expert's load and mean probability, summed and scaled to 1 at balance.

    E · Σₑ fₑ Pₑ with fₑ the share of the slots that went to expert e and Pₑ its mean probability
    (Fedus et al., arXiv:2101.03961, equations 4 to 6). It is differentiable through Pₑ and
    reaches E when all tokens go to one expert with certainty.

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    top_k_index : Tensor, shape (T, k)
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.

    Returns
    -------
    Tensor
        Scalar of float32.
    """
    experts = router_logits.shape[-1]
    probabilities = router_logits.float().softmax(-1)
    slots = torch.nn.functional.one_hot(top_k_index, experts).float().mean(-2)
    weights = _token_weights(probabilities, attention_mask)
    return experts * ((weights @ slots) * (weights @ probabilities)).sum()


def router_z_loss(router_logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the scores (ST-MoE, arXiv:2202.08906, equation 5).

    Parameters
    ----------
    router_logits : Tensor, shape (T, E)
    attention_mask : Tensor of T entries, any shape, optional
        Tokens where it is 0 do not count.

    Returns
    -------
    Tensor
        Scalar of float32.
    """
    squares = router_logits.float().logsumexp(-1).square()
    return _token_weights(router_logits, attention_mask) @ squares


def _token_weights(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Weights of a mean over the tokens that count, shape (T,)."""
    if attention_mask is None:
        weights = torch.ones(tokens.shape[0], device=tokens.device)
    else:
        weights = (attention_mask.reshape(-1) != 0).float()
    return weights / weights.sum().clamp(min=1)
