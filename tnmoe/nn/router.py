"""Routers: which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.shapes import positive_int


class TopKRouter(nn.Module):
    """Softmax over a linear score per expert; the k largest are taken.

    Shazeer et al., arXiv:1701.06538, section 2.1, without noise; with ``top_k=1`` the router of
    the Switch transformer (Fedus et al., arXiv:2101.03961, section 2.1). Scores are computed in
    float32 at least, whatever the model's precision, autocast included.

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    top_k : int
        Experts per token.
    normalize : bool
        Divide the weights of the chosen experts by their sum. Identical experts then give
        exactly the output of one of them, so an upcycled layer starts as the dense one; without,
        its output is scaled by the probability of the chosen experts. With ``top_k=1`` the
        weight is always 1; the divisor then counts as a constant in the backward pass, so that
        the router still learns from the task.
    jitter_noise : float
        In training, multiply inputs by numbers drawn from [1 − jitter, 1 + jitter].

    Attributes
    ----------
    weight : Parameter, shape (E, H)

    Raises
    ------
    InputError
        If ``top_k`` exceeds ``num_experts`` or an argument is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        normalize: bool = True,
        jitter_noise: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = positive_int("hidden_size", hidden_size)
        self.num_experts = positive_int("num_experts", num_experts)
        self.top_k = positive_int("top_k", top_k)
        if top_k > num_experts:
            raise InputError(f"top_k={top_k} exceeds num_experts={num_experts}")
        if not 0 <= jitter_noise < 1:
            raise InputError(f"jitter_noise must be in [0, 1), got {jitter_noise!r}")
        self.normalize = normalize
        self.jitter_noise = jitter_noise
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Parameters
        ----------
        x : Tensor, shape (T, H)

        Returns
        -------
        router_logits : Tensor of float32 (float64 for float64 inputs), shape (T, E)
        top_k_weights : Tensor, shape (T, k)
            In the dtype of ``x``.
        top_k_index : Tensor of int64, shape (T, k)
        """
        with torch.autocast(x.device.type, enabled=False):
            scored = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and self.jitter_noise:
                low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
                scored = scored * torch.empty_like(scored).uniform_(low, high)
            logits = F.linear(scored, self.weight.to(scored.dtype))
            weights, index = logits.softmax(-1).topk(self.top_k)
            if self.normalize:
                total = weights.sum(-1, keepdim=True)
                weights = weights / (total.detach() if self.top_k == 1 else total)
        return logits, weights.to(x.dtype), index

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, normalize={self.normalize}, jitter_noise={self.jitter_noise}"
        )
