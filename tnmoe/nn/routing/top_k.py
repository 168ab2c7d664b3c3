"""The router in which every token chooses its k experts."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError, check_bool, check_number_in, check_one_of, check_positive_int
from tnmoe.nn.routing.capacity import expert_capacity, sequence_lengths, slots_within_capacity
from tnmoe.nn.routing.load_bias import LoadBias
from tnmoe.nn.routing.router import Router
from tnmoe.nn.transforms import is_transformed
from tnmoe.options import (
    BATCH_SCOPES,
    SECOND_EXPERT,
    BatchScope,
    ScoreFunction,
    SecondExpert,
)


class TopKRouter(Router):
    """A router that sends every token to the k experts with the highest scores.

    One class covers the routers of many papers:

    ========================  ====================================================================
    Switch                    ``top_k=1, normalize=False, jitter_noise=0.01, capacity_factor=1.25``
    GShard                    ``top_k=2, second_expert="random", capacity_factor=1.0``; a first
                              expert without a second one has weight 1 here, and less in GShard
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
        Experts per token, k.
    score_function : {"softmax", "sigmoid"}
        Scores of a token: a softmax over all experts, or each expert's sigmoid (DeepSeek-V3,
        arXiv:2412.19437, equations 12 to 15).
    normalize : bool
        Divide the weights of a token's experts by their sum. With a softmax the result is the
        softmax of the chosen logits alone. So softmax *after* selection (gpt-oss) and softmax
        *before* it with renormalisation (Mixtral) are the same, and this setting is both. False
        means softmax before selection without renormalisation (Switch).
    jitter_noise : float
        In training, multiply inputs by numbers drawn from [1 − jitter, 1 + jitter].
    capacity_factor : float, optional
        In training every expert accepts ``ceil(capacity_factor · k · T / E)`` slots, that is
        (token, choice) pairs (GShard's 2 T / E is a factor of 1). It accepts the first choices of
        all tokens before the second ones, and equal choices in the order of the tokens. The
        remaining slots are dropped. A token whose slots are all dropped gets 0: behind a residual
        connection it passes through unchanged (Fedus et al., arXiv:2101.03961, section 2.2).
    eval_capacity_factor : float, optional
        The same outside training. By default nothing is dropped there.
    capacity_scope : {"batch", "sequence"}
        What the T tokens above are: all tokens of a call, or the tokens of one sequence.
    noisy : bool
        In training, add noise of a learned standard deviation to the logits: softplus of a second
        linear map ``noise_weight`` (Shazeer et al., arXiv:1701.06538, equations 3 to 5).
    bias : bool
        Whether every expert has a bias on its logits.
    straight_through : bool
        With ``normalize``, whether a weight that is always 1 still has a gradient: see Notes.
    scale : float
        Factor on all weights (DeepSeek-V3's routed scaling factor).
    load_bias : bool
        Add a bias to the scores that choose experts, but not to the weights.
        :class:`BiasBalancer` raises it for experts with little load and lowers it for experts with
        much load, outside the gradient (Wang et al., arXiv:2408.15664, section 3). Under the
        transforms of ``torch.func``, which allow no side effects, a router does not count its
        load.
    num_groups, top_groups : int
        Choose among the experts of the ``top_groups`` best of ``num_groups`` groups of consecutive
        experts (DeepSeek-V3, section 2.1.2).
    group_score : int
        A group's score is the sum of the scores of its ``group_score`` best experts: 2 in
        DeepSeek-V3, 1 in DeepSeek-V2.
    second_expert : {"all", "none", "threshold", "random"}
        Only for ``top_k=2``: whether a token goes to its second choice, whose share of the two
        weights is g. ``all``: always. ``none``: never. ``threshold``: if g > ``second_threshold``.
        ``random``: in training with probability min(1, 2 g), and always outside training
        (Lepikhin et al., arXiv:2006.16668, section 2.2).
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
    **Upcycling.** Where all experts are the same, the layer computes what one expert computes if a
    token's weights sum to 1. With ``normalize`` they do, for any ``top_k``, ``score_function``,
    noise, bias, groups and policy for second experts. They do not

    - with ``normalize=False``: the output is scaled by the sum of the chosen experts' scores (by
      p, about 1/E at the start, for ``top_k=1`` with a softmax);
    - with a ``scale`` other than 1: the output is scaled by it;
    - with a capacity, for tokens whose slots are all dropped: they get 0.

    **Top-1 and the router's gradient.** With ``top_k=1`` and ``normalize`` a token has one weight,
    and it is 1 whatever the logits are. The task's loss would not reach the router. The same
    happens where a capacity drops all but one of a token's slots. ``straight_through`` (the
    default) therefore treats the divisor as a constant in the backward pass: the weight is exactly
    1, and its gradient is that of the logarithm of the chosen score. Training then makes an expert
    that lowers the loss more likely, as in Switch, where the gradient is that of the score p
    itself, p times as large. With False only the auxiliary losses train the router on such tokens.

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
        *,
        score_function: ScoreFunction = "softmax",
        normalize: bool = True,
        jitter_noise: float = 0.0,
        capacity_factor: float | None = None,
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
            hidden_size, num_experts, score_function=score_function, normalize=normalize,
            jitter_noise=jitter_noise, bias=bias, straight_through=straight_through,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._set_top_k(top_k)
        self._set_capacity(capacity_factor, eval_capacity_factor, capacity_scope)
        self._set_second_expert(second_expert, second_threshold)
        self._set_groups(num_groups, top_groups, group_score)
        self.scale = check_number_in("scale", scale, "(0, inf)")
        is_noisy, has_load_bias = check_bool("noisy", noisy), check_bool("load_bias", load_bias)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight)) if is_noisy else None
        self.load_bias = LoadBias(self.num_experts, device) if has_load_bias else None
        self.reset_parameters()

    def _set_top_k(self, top_k: int) -> None:
        self.top_k = check_positive_int("top_k", top_k)

    def _set_capacity(
        self, training: float | None, evaluation: float | None, scope: BatchScope
    ) -> None:
        self.capacity_factor = _optional_factor("capacity_factor", training)
        self.eval_capacity_factor = _optional_factor("eval_capacity_factor", evaluation)
        check_one_of("capacity_scope", scope, BATCH_SCOPES)
        self.capacity_scope = scope

    def _set_second_expert(self, policy: SecondExpert, threshold: float) -> None:
        check_one_of("second_expert", policy, SECOND_EXPERT)
        if policy != "all" and self.top_k != 2:
            raise InputError(f"second_expert={policy!r} needs top_k=2, got top_k={self.top_k}")
        self.second_expert = policy
        self.second_threshold = check_number_in("second_threshold", threshold, "[0, 1]")

    def _set_groups(self, num_groups: int, top_groups: int, group_score: int) -> None:
        self.num_groups = check_positive_int("num_groups", num_groups)
        self.top_groups = check_positive_int("top_groups", top_groups)
        if self.top_groups > self.num_groups:
            raise InputError(f"top_groups={self.top_groups} exceeds num_groups={self.num_groups}")
        self.check_experts(self.num_experts)
        size = self.num_experts // self.num_groups
        self.group_score = min(check_positive_int("group_score", group_score), size)

    def check_experts(self, count: int) -> None:
        super().check_experts(count)
        if self.top_k > count:
            raise InputError(f"top_k={self.top_k} exceeds num_experts={count}")
        if count % self.num_groups:
            raise InputError(
                f"num_groups={self.num_groups} does not divide the number of experts {count}"
            )
        size = count // self.num_groups
        if self.top_k > self.top_groups * size:
            raise InputError(
                f"top_k={self.top_k} exceeds the {self.top_groups * size} experts of "
                f"top_groups={self.top_groups} of {self.num_groups} groups"
            )

    def expert_rows(self, expert: int) -> dict[str, slice]:
        noise = {} if self.noise_weight is None else {"noise_weight": slice(expert, expert + 1)}
        return super().expert_rows(expert) | noise

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
        if self.load_bias is not None:
            self.load_bias.reset()

    def chosen_experts(self, logits: Tensor, index: Tensor) -> Tensor:
        if self.open_experts is not None:
            logits = logits.index_select(1, self.open_experts)
        return self._numbers_of_open(self._choose_experts(logits))

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = super()._logits(tokens)
        if self.noise_weight is None or not self.training:
            return logits
        noise_weight = self._of_open(self.noise_weight).to(tokens.dtype)
        deviation = F.softplus(F.linear(tokens, noise_weight))
        return logits + deviation * torch.randn_like(logits)

    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        if self.load_bias is None and self.num_groups == 1:
            chosen_logits, index = logits.topk(self.top_k)
        else:
            index = self._choose_experts(logits)
            chosen_logits = logits.gather(-1, index)
        if self.load_bias is not None and self.training and not is_transformed():
            self.load_bias.count(self._numbers_of_open(index), mask)
        kept = self._kept_slots(index, chosen_logits, logits.shape[1], mask, sequences)
        weights = self._slot_weights(chosen_logits, logits, kept)
        if self.scale != 1:
            weights = weights * self.scale
        if kept is not None:
            index = torch.where(kept, index, logits.shape[1])
        return weights, index

    @torch.no_grad()
    def _choose_experts(self, logits: Tensor) -> Tensor:
        """Return the k experts with the highest scores, (T, k), best first."""
        scores = logits
        if self.load_bias is not None or self.num_groups > 1:
            scores = self.log_scores(logits).exp()
        if self.load_bias is not None:
            scores = self.load_bias(scores, self.open_experts)
        if self.num_groups > 1:
            scores = self._exclude_other_groups(scores)
        return scores.topk(self.top_k).indices

    def _exclude_other_groups(self, scores: Tensor) -> Tensor:
        """Return scores (T, E) with −∞ for the experts outside a token's best groups."""
        size = scores.shape[1] // self.num_groups
        by_group = scores.view(scores.shape[0], self.num_groups, size)
        group_scores = by_group.topk(min(self.group_score, size)).values.sum(-1)
        best = group_scores.topk(self.top_groups, sorted=False).indices
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
        return by_group.masked_fill(excluded[..., None], -inf).view_as(scores)

    def _kept_slots(
        self,
        index: Tensor,
        chosen_logits: Tensor,
        experts: int,
        mask: Tensor | None,
        sequences: int,
    ) -> Tensor | None:
        """Return which slots reach their expert, (T, k); None if all do."""
        kept = None if mask is None else mask[:, None].expand_as(index)
        if self.second_expert != "all":
            second = self._uses_second_expert(self._normalized_scores(chosen_logits.detach())[:, 1])
            by_policy = torch.stack([torch.ones_like(second), second], 1)
            kept = by_policy if kept is None else kept & by_policy
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return kept
        kept = torch.ones_like(index, dtype=torch.bool) if kept is None else kept
        sequences = sequences if self.capacity_scope == "sequence" else 1
        lengths = sequence_lengths(mask, index, sequences)
        capacity = expert_capacity(factor * self.top_k, experts, lengths)
        return slots_within_capacity(index, kept, capacity, experts)

    def _uses_second_expert(self, share: Tensor) -> Tensor:
        """Return which tokens go to their second choice, given its share of the weights, (T,)."""
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


def _optional_factor(name: str, factor: float | None) -> float | None:
    return None if factor is None else check_number_in(name, factor, "(0, inf)")
