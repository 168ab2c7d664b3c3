"""Routers: which experts a token goes to, and with what weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf, prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError, flag, number_in, one_of, positive_int
from tnmoe.nn.routing.capacity import check_mask, first_of_each, room
from tnmoe.nn.routing.load_bias import LoadBias
from tnmoe.nn.scopes import Scope
from tnmoe.nn.transforms import is_transformed, needs_native_operators, without_autocast
from tnmoe.options import (
    BATCH_SCOPES,
    SCORE_FUNCTIONS,
    SECOND_EXPERT,
    BatchScope,
    ScoreFunction,
    SecondExpert,
)

Routed = tuple[Tensor, Tensor, Tensor]

# What is told of every call of a router: see record_routing.
recorders: Scope[Callable[..., None]] = Scope("_recorders")


class Router(nn.Module, ABC):
    """A linear score per expert, in float32 at least whatever the model's precision.

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    score_function : {"softmax", "sigmoid"}
        What makes scores of a token's logits.
    normalize, straight_through : bool
        What makes weights of the scores of a token's experts; see :class:`TopKRouter`.
    bias : bool
        Whether every expert has a bias on its logits.
    jitter_noise : float
        In training, multiply inputs by numbers drawn from [1 − jitter, 1 + jitter] (Fedus et al.,
        arXiv:2101.03961, appendix C).
    device, dtype
        Of the parameters, as for torch's own layers.

    Attributes
    ----------
    weight : Parameter, shape (E, H)
    bias : Parameter, shape (E,), or None

    Raises
    ------
    InputError
        If a size, the noise or the score function is none of those that there are.

    Examples
    --------
    >>> router = TopKRouter(hidden_size=8, num_experts=4)
    >>> isinstance(router, Router), router.weight.shape
    (True, torch.Size([4, 8]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        score_function: ScoreFunction,
        normalize: bool,
        straight_through: bool,
        bias: bool,
        jitter_noise: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.hidden_size = positive_int("hidden_size", hidden_size)
        self.num_experts = positive_int("num_experts", num_experts)
        one_of("score_function", score_function, SCORE_FUNCTIONS)
        self.score_function = score_function
        self.normalize = flag("normalize", normalize)
        self.straight_through = flag("straight_through", straight_through)
        self.jitter_noise = number_in("jitter_noise", jitter_noise, "[0, 1)")
        size: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, **size))
        has_bias = flag("bias", bias)
        self.bias = nn.Parameter(torch.empty(self.num_experts, **size)) if has_bias else None

    def reset_parameters(self) -> None:
        """Draw new weights with standard deviation 0.02; biases become 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routed:
        """Route tokens.

        Parameters
        ----------
        x : Tensor, shape (T, H) or (B, S, H)
            Tokens, or sequences of them: T = B · S.
        token_mask : Tensor of T entries, any shape, optional
            Tokens where it is 0, padding for instance, go to no expert and take no room.

        Returns
        -------
        router_logits : Tensor of float32 (float64 for float64 inputs), shape (T, E)
        top_k_weights : Tensor, shape (T, k)
            In the dtype of ``x``.
        top_k_index : Tensor of int64, shape (T, k)
            Experts from 0 to E − 1; E for none, with weight 0.

        Raises
        ------
        InputError
            If the mask has not as many entries as there are tokens or holds negative numbers, or
            ``x`` has another last size or no floating-point numbers.
        """
        if x.shape[-1:] != (self.hidden_size,) or not x.is_floating_point():
            raise InputError(
                f"expected floating-point numbers of shape (..., {self.hidden_size}), "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        mask = check_mask(token_mask, tokens.shape[0])
        if mask is not None:
            # Whatever padding holds must not reach the weights' gradient.
            tokens = tokens.masked_fill(~mask[:, None], 0)
        sequences = self.count_sequences(x)
        with without_autocast(x.device):
            logits = self._logits(tokens.to(torch.promote_types(x.dtype, torch.float32)))
            weights, index = self._route(logits, mask, sequences)
        weights = weights.to(x.dtype)
        for record in recorders.of(self):
            record(self, logits, weights, index, mask, sequences)
        return logits, weights, index

    @staticmethod
    def count_sequences(x: Tensor) -> int:
        """How many sequences of tokens ``x``, (..., S, H), holds."""
        return prod(x.shape[:-2]) if x.ndim > 2 and x.numel() else 1

    def _logits(self, tokens: Tensor) -> Tensor:
        if self.training and self.jitter_noise:
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            tokens = tokens * torch.empty_like(tokens).uniform_(low, high)
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        return F.linear(tokens, self.weight.to(tokens.dtype), bias)

    def log_scores(self, logits: Tensor) -> Tensor:
        """Logarithms of the scores of ``logits``, (T, E) both, which do not underflow."""
        return logits.log_softmax(-1) if self.score_function == "softmax" else F.logsigmoid(logits)

    def _shares(self, chosen: Tensor) -> Tensor:
        """Scores of chosen logits (T, k), divided by their sum."""
        # Of exponentials of the logits, a softmax over all experts or over these is the same.
        return (chosen if self.score_function == "softmax" else F.logsigmoid(chosen)).softmax(-1)

    def _log_scores_of(self, chosen: Tensor, logits: Tensor) -> Tensor:
        """Logarithms of the scores of chosen logits (T, k), all being (T, E)."""
        if self.score_function == "softmax":
            return chosen - logits.logsumexp(-1, keepdim=True)
        return F.logsigmoid(chosen)

    def _weigh(self, chosen: Tensor, logits: Tensor, kept: Tensor | None) -> Tensor:
        """Weights (T, k) of the choices that are followed, from their logits and all (T, E)."""
        if not self.normalize:
            weights = self._log_scores_of(chosen, logits).exp()
        elif chosen.shape[1] == 1:
            weights = self._weigh_one(chosen, logits)
        elif kept is None:
            weights = self._shares(chosen)
        else:
            weights = self._shares(chosen.masked_fill(~kept, torch.finfo(chosen.dtype).min))
            alone = kept.sum(-1, keepdim=True) == 1
            weights = torch.where(alone, self._weigh_one(chosen, logits), weights)
        return weights if kept is None else weights.masked_fill(~kept, 0)

    def _weigh_one(self, chosen: Tensor, logits: Tensor) -> Tensor:
        """Weights of experts that are alone: exactly 1, with the gradient of the log-score."""
        # Forward-mode derivatives are asked for without a sign on the tensor.
        if not (self.straight_through and (logits.requires_grad or needs_native_operators())):
            return torch.ones_like(chosen)
        log_scores = self._log_scores_of(chosen, logits)
        return (log_scores - log_scores.detach()).exp()

    @abstractmethod
    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        """Weights and experts, (T, k) each, of B sequences one after the other."""

    @abstractmethod
    def choices(self, logits: Tensor, index: Tensor) -> Tensor:
        """Experts that tokens asked for, whether or not these had room for them.

        Parameters
        ----------
        logits : Tensor, shape (T, E)
        index : Tensor of int64, shape (T, k)
            As ``forward`` returned them.

        Returns
        -------
        Tensor of int64, shape (T, k)
        """

    def _replicate_for_data_parallel(self) -> Self:
        return recorders.hand_over(self, super()._replicate_for_data_parallel())

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"score_function={self.score_function}, jitter_noise={self.jitter_noise}"
        )


class TopKRouter(Router):
    """Every token goes to the k experts that score highest.

    One class for the routers of many papers:

    ========================  ====================================================================
    Switch                    ``top_k=1, normalize=False, jitter_noise=0.01, capacity_factor=1.25``
    GShard                    ``top_k=2, second_expert="random", capacity_factor=1.0``; a first
                              expert that stays alone has weight 1 here, and less in GShard
    Shazeer et al. 2017       ``top_k=k, noisy=True``
    Mixtral, Qwen3-MoE        ``top_k=k``
    gpt-oss                   ``top_k=k, bias=True``
    DeepSeek-V3               ``top_k=8, score_function="sigmoid", load_bias=True, num_groups=8,
                              top_groups=4, scale=2.5``
    ========================  ====================================================================

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    top_k : int
        Experts per token.
    score_function : {"softmax", "sigmoid"}
        Scores of a token: a softmax over all experts, or each expert's sigmoid (DeepSeek-V3,
        arXiv:2412.19437, equations 12 to 15).
    normalize : bool
        Divide the weights of the experts a token goes to by their sum. With a softmax that is the
        softmax of the chosen logits alone: softmax *after* selection (gpt-oss) and softmax
        *before* it with renormalisation (Mixtral) are one and the same, and this is it. False is
        softmax before selection without renormalisation (Switch).
    jitter_noise : float
        In training, multiply inputs by numbers drawn from [1 − jitter, 1 + jitter].
    capacity_factor : float, optional
        In training every expert has room for ``ceil(capacity_factor · k · T / E)`` tokens
        (GShard's 2 T / E is a factor of 1), first choices of all tokens before second ones, then
        in the order of tokens. What finds no room is dropped, and a token whose choices all are
        gets 0: behind a residual connection it passes through unchanged (Fedus et al.,
        arXiv:2101.03961, section 2.2).
    eval_capacity_factor : float, optional
        The same out of training; by default nothing is dropped there.
    capacity_scope : {"batch", "sequence"}
        What the T tokens above are: all of a call, or those of every sequence.
    noisy : bool
        In training, add noise of a learned standard deviation to the logits: softplus of a second
        linear map ``noise_weight`` (Shazeer et al., arXiv:1701.06538, equations 3 to 5).
    bias : bool
        Whether every expert has a bias on its logits.
    straight_through : bool
        With ``normalize``, whether a weight that is 1 by itself teaches the router: see Notes.
    scale : float
        Multiplies all weights (DeepSeek-V3's routed scaling factor).
    load_bias : bool
        Add a bias to the scores that choose, not to those that weigh; :class:`BiasBalancer`
        raises it for experts with little load and lowers it for others, outside the gradient
        (Wang et al., arXiv:2408.15664, section 3). Transformed by ``torch.func``, which knows no
        side effects, a router does not count its load.
    num_groups, top_groups : int
        Choose among the experts of the ``top_groups`` best of ``num_groups`` groups of neighbours
        (DeepSeek-V3, section 2.1.2).
    group_score : int
        How many of its best experts' scores a group is judged by the sum of: 2 in DeepSeek-V3,
        1 in DeepSeek-V2.
    second_expert : {"all", "none", "threshold", "random"}
        Only for ``top_k=2``: whether a token goes to its second choice, whose share of the two
        weights is g: always, never, if g > ``second_threshold``, or in training with probability
        min(1, 2 g) and out of it always (Lepikhin et al., arXiv:2006.16668, section 2.2).
    second_threshold : float
        See ``second_expert``.
    device, dtype
        Of the parameters, as for torch's own layers.

    Attributes
    ----------
    weight : Parameter, shape (E, H)
    bias : Parameter, shape (E,), or None
    noise_weight : Parameter, shape (E, H), or None
    load_bias : LoadBias or None

    Raises
    ------
    InputError
        If ``top_k`` exceeds ``num_experts`` or an argument is out of range.

    Notes
    -----
    **Upcycling.** Where all experts are the same, the layer computes what one of them does if a
    token's weights sum to 1. That is so with ``normalize`` for any ``top_k``, ``score_function``,
    noise, bias, groups and policy for second experts. It is not so

    - with ``normalize=False``: the output is scaled by the sum of the chosen experts' scores
      (``top_k=1`` with a softmax by p, about 1/E at the start);
    - with a ``scale`` other than 1, by that;
    - with a capacity, for tokens whose every choice is dropped: they get 0.

    **Top-1 and the router's gradient.** The one weight of ``top_k=1`` with ``normalize`` is 1
    whatever the logits are, so the task's loss would not reach the router; likewise where all but
    one of a token's choices are dropped. ``straight_through`` (the default) therefore treats the
    divisor as a constant in the backward pass: the weight is exactly 1, and its gradient that of
    the logarithm of the chosen score. An expert that lowers the loss is made more likely, as in
    Switch, where the gradient is that of the score itself, p times as large. False leaves such
    tokens to the auxiliary losses alone.

    Examples
    --------
    >>> import torch
    >>> router = TopKRouter(8, num_experts=4, top_k=2)
    >>> logits, weights, index = router(torch.randn(5, 8))
    >>> weights.sum(-1).allclose(torch.ones(5)), index.shape
    (True, torch.Size([5, 2]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        score_function: ScoreFunction = "softmax",
        normalize: bool = True,
        jitter_noise: float = 0.0,
        capacity_factor: float | None = None,
        *,
        eval_capacity_factor: float | None = None,
        capacity_scope: BatchScope = "batch",
        noisy: bool = False,
        bias: bool = False,
        straight_through: bool = True,
        scale: float = 1.0,
        load_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: int = 2,
        second_expert: SecondExpert = "all",
        second_threshold: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, score_function, normalize, straight_through, bias,
            jitter_noise, device, dtype,
        )  # fmt: skip
        self.top_k = positive_int("top_k", top_k)
        if self.top_k > self.num_experts:
            raise InputError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")
        self.capacity_factor = _factor("capacity_factor", capacity_factor)
        self.eval_capacity_factor = _factor("eval_capacity_factor", eval_capacity_factor)
        one_of("capacity_scope", capacity_scope, BATCH_SCOPES)
        one_of("second_expert", second_expert, SECOND_EXPERT)
        if second_expert != "all" and self.top_k != 2:
            raise InputError(
                f"second_expert={second_expert!r} needs top_k=2, got top_k={self.top_k}"
            )
        self.num_groups = positive_int("num_groups", num_groups)
        self.top_groups = positive_int("top_groups", top_groups)
        _check_groups(self.num_experts, self.top_k, self.num_groups, self.top_groups)
        self.scale = number_in("scale", scale, "(0, inf)")
        self.capacity_scope = capacity_scope
        size = self.num_experts // self.num_groups
        self.group_score = min(positive_int("group_score", group_score), size)
        self.second_expert = second_expert
        self.second_threshold = number_in("second_threshold", second_threshold, "[0, 1]")
        is_noisy, has_load_bias = flag("noisy", noisy), flag("load_bias", load_bias)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight)) if is_noisy else None
        self.load_bias = LoadBias(self.num_experts, device) if has_load_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
        if self.load_bias is not None:
            self.load_bias.reset()

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = super()._logits(tokens)
        if self.noise_weight is None or not self.training:
            return logits
        deviation = F.softplus(F.linear(tokens, self.noise_weight.to(tokens.dtype)))
        return logits + deviation * torch.randn_like(logits)

    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        if self.load_bias is None and self.num_groups == 1:
            chosen, index = logits.topk(self.top_k)
        else:
            index = self._choose(logits)
            chosen = logits.gather(-1, index)
        if self.load_bias is not None and self.training and not is_transformed():
            self.load_bias.count(index, mask)
        kept = self._kept(index, chosen, mask, sequences)
        weights = self._weigh(chosen, logits, kept)
        if self.scale != 1:
            weights = weights * self.scale
        if kept is not None:
            index = torch.where(kept, index, self.num_experts)
        return weights, index

    def choices(self, logits: Tensor, index: Tensor) -> Tensor:
        return self._choose(logits)

    @torch.no_grad()
    def _choose(self, logits: Tensor) -> Tensor:
        """The experts that score highest, (T, k), best first."""
        scores = logits
        if self.load_bias is not None or self.num_groups > 1:
            scores = self.log_scores(logits).exp()
        if self.load_bias is not None:
            scores = self.load_bias(scores)
        if self.num_groups > 1:
            size = self.num_experts // self.num_groups
            groups = scores.view(scores.shape[0], self.num_groups, size)
            merit = groups.topk(self.group_score).values.sum(-1)
            best = merit.topk(self.top_groups, sorted=False).indices
            out = torch.ones_like(merit, dtype=torch.bool).scatter(1, best, False)
            scores = groups.masked_fill(out[..., None], -inf).view_as(scores)
        return scores.topk(self.top_k).indices

    def _kept(
        self, index: Tensor, chosen: Tensor, mask: Tensor | None, sequences: int
    ) -> Tensor | None:
        """Choices that are followed, (T, k); None for all of them."""
        kept = None if mask is None else mask[:, None].expand_as(index)
        if self.second_expert != "all":
            second = self._wants_second(self._shares(chosen.detach())[:, 1])
            both = torch.stack([torch.ones_like(second), second], 1)
            kept = both if kept is None else kept & both
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return kept
        kept = torch.ones_like(index, dtype=torch.bool) if kept is None else kept
        sequences = sequences if self.capacity_scope == "sequence" else 1
        capacity = room(
            factor * self.top_k, self.num_experts, mask, index.shape[0], sequences, index
        )
        return first_of_each(index, kept, capacity, self.num_experts)

    def _wants_second(self, share: Tensor) -> Tensor:
        """Which tokens go to their second choice, given its share of the weights, (T,)."""
        if self.second_expert == "threshold":
            return share > self.second_threshold
        if self.second_expert == "random" and self.training:
            return 2 * share > torch.rand_like(share)
        return torch.full_like(share, self.second_expert != "none", dtype=torch.bool)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, top_k={self.top_k}, normalize={self.normalize}, "
            f"capacity_factor={self.capacity_factor}"
        )


def _factor(name: str, factor: float | None) -> float | None:
    return None if factor is None else number_in(name, factor, "(0, inf)")


def _check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    if num_experts % num_groups:
        raise InputError(
            f"num_groups={num_groups} does not divide the number of experts {num_experts}"
        )
    if top_groups > num_groups:
        raise InputError(f"top_groups={top_groups} exceeds num_groups={num_groups}")
    if top_k > top_groups * (num_experts // num_groups):
        raise InputError(
            f"top_k={top_k} exceeds the {top_groups * (num_experts // num_groups)} experts of "
            f"top_groups={top_groups} of {num_groups} groups"
        )
