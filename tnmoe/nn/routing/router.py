"""The base of all routers: logits and scores of experts, and the weights of slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError, check_bool, check_number_in, check_one_of, check_positive_int
from tnmoe.nn.routing.token_mask import check_token_mask, zero_masked
from tnmoe.nn.scopes import ScopedValues
from tnmoe.nn.transforms import cast, needs_native_operators, without_autocast
from tnmoe.options import SCORE_FUNCTIONS, ScoreFunction


@dataclass(frozen=True)
class RouterResult:
    """The tensors that a router returned, the tokens that it saw and the experts that were open.

    The attributes are those of :class:`tnmoe.nn.RoutingCall`.
    """

    logits: Tensor
    weights: Tensor
    index: Tensor
    token_mask: Tensor | None
    sequences: int
    open_experts: Tensor | None


CallObserver = Callable[["Router", RouterResult], None]

# Every call of a router notifies these: see record_routing.
call_observers: ScopedValues[CallObserver] = ScopedValues("_call_observers")


class Router(nn.Module, ABC):
    """A linear map from tokens to one logit per expert, and a rule that chooses experts by them.

    Logits are computed in float32 at least, whatever the model's precision. Experts may be closed:
    the router then works as if it did not have them. See :func:`close_experts`.

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    score_function : {"softmax", "sigmoid"}
        Turns a token's logits into scores.
    normalize, straight_through : bool
        How scores become weights; see :class:`TopKRouter`.
    jitter_noise : float
        In training, multiply inputs by numbers drawn from [1 − jitter, 1 + jitter] (Fedus et al.,
        arXiv:2101.03961, appendix C).
    bias : bool
        Whether every expert has a bias on its logits.
    device, dtype
        Of the parameters, as for torch's own layers.

    Attributes
    ----------
    weight : Parameter, shape (E, H)
    bias : Parameter, shape (E,), or None
    open_experts : Tensor of int64, shape (O,), or None
        The open experts in ascending order; None if all are. A buffer, saved with the model as
        soon as an expert is closed. A state without it opens all experts.

    Raises
    ------
    InputError
        If a size is not positive, the jitter is not in [0, 1), or the score function is unknown.

    Examples
    --------
    >>> from tnmoe.nn import TopKRouter
    >>> router = TopKRouter(hidden_size=8, num_experts=4)
    >>> isinstance(router, Router), router.weight.shape
    (True, torch.Size([4, 8]))
    """

    open_experts: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        score_function: ScoreFunction = "softmax",
        normalize: bool = True,
        jitter_noise: float = 0.0,
        bias: bool = False,
        straight_through: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = check_positive_int("hidden_size", hidden_size)
        self.num_experts = check_positive_int("num_experts", num_experts)
        check_one_of("score_function", score_function, SCORE_FUNCTIONS)
        self.score_function = score_function
        self.normalize = check_bool("normalize", normalize)
        self.straight_through = check_bool("straight_through", straight_through)
        self.jitter_noise = check_number_in("jitter_noise", jitter_noise, "[0, 1)")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, **like))
        has_bias = check_bool("bias", bias)
        self.bias = nn.Parameter(torch.empty(self.num_experts, **like)) if has_bias else None
        # The numbers of the open experts, and not a mask: their count is then known without waiting
        # for an accelerator.
        self.register_buffer("open_experts", None)

    def check_experts(self, count: int) -> None:
        """Raise an InputError unless the router can choose among ``count`` experts.

        Parameters
        ----------
        count : int
        """
        check_positive_int("the number of experts to choose among", count)

    def expert_rows(self, expert: int) -> dict[str, slice]:
        """Return the rows of one expert in every tensor of this module that has rows of experts.

        A subclass with more such tensors adds them: :func:`add_experts` and the like copy and drop
        these rows. The tensors of submodules are not among them.

        Parameters
        ----------
        expert : int

        Returns
        -------
        dict from str to slice
            By the names of the tensors.
        """
        rows = {"weight": self.weight, "bias": self.bias}
        return {name: slice(expert, expert + 1) for name, one in rows.items() if one is not None}

    def _keep_experts(self, experts: Sequence[int]) -> None:
        """Take over the number of experts, after the rows of the tensors were exchanged.

        Parameters
        ----------
        experts : sequence of int
            Which old expert every new one was.
        """
        self.num_experts = len(experts)

    def reset_parameters(self) -> None:
        """Draw new weights with standard deviation 0.02; set biases to 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Parameters
        ----------
        x : Tensor, shape (T, H) or (B, S, H)
            Tokens, or sequences of them: T = B · S.
        token_mask : Tensor of T entries, any shape, optional
            Tokens where it is 0, padding for instance, go to no expert and use no capacity.

        Returns
        -------
        router_logits : Tensor of float32 (float64 for float64 inputs), shape (T, E)
            −∞ for closed experts.
        top_k_weights : Tensor, shape (T, k)
            Weight of every slot, a (token, choice) pair, in the dtype of ``x``.
        top_k_index : Tensor of int64, shape (T, k)
            Expert of every slot, from 0 to E − 1. Index E marks a slot without an expert; its
            weight is 0.

        Raises
        ------
        InputError
            If the mask does not have an entry for each token or holds negative numbers, or if
            ``x`` has another last size or no floating-point numbers.
        """
        if x.shape[-1:] != (self.hidden_size,) or not x.is_floating_point():
            raise InputError(
                f"expected floating-point numbers of shape (..., {self.hidden_size}), "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        mask = check_token_mask(token_mask, tokens.shape[0])
        # The content of padding must not reach the gradient of the weights.
        tokens = zero_masked(tokens, mask)
        sequences = self.count_sequences(x)
        with without_autocast(x.device):
            logits = self._logits(cast(tokens, torch.promote_types(x.dtype, torch.float32)))
            weights, index = self._route(logits, mask, sequences)
        weights = cast(weights, x.dtype)
        logits, index = self._logits_of_all(logits), self._numbers_of_open(index)
        result = RouterResult(logits, weights, index, mask, sequences, self.open_experts)
        for observe in call_observers.values_for(self):
            observe(self, result)
        return logits, weights, index

    @staticmethod
    def count_sequences(x: Tensor) -> int:
        """Count the sequences of tokens in ``x``, (..., S, H)."""
        return prod(x.shape[:-2]) if x.ndim > 2 and x.numel() else 1

    @abstractmethod
    def chosen_experts(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return the experts that tokens chose, before any capacity dropped slots.

        Parameters
        ----------
        logits : Tensor, shape (T, E)
        index : Tensor of int64, shape (T, k)
            Both as ``forward`` returned them.

        Returns
        -------
        Tensor of int64, shape (T, k)
        """

    @abstractmethod
    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        """Return weights and experts of the slots, (T, k) each, of B sequences in a row.

        ``logits`` are those of the O open experts, (T, O), and the result counts these alone, from
        0 to O − 1. Number O marks a slot without an expert.
        """

    def _logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of the open experts, (T, O)."""
        if self.training and self.jitter_noise:
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            tokens = tokens * torch.empty_like(tokens).uniform_(low, high)
        bias = None if self.bias is None else self._of_open(self.bias).to(tokens.dtype)
        return F.linear(tokens, cast(self._of_open(self.weight), tokens.dtype), bias)

    def _of_open(self, rows: Tensor) -> Tensor:
        """Return the rows of the open experts, (O, …), of those of all, (E, …)."""
        return rows if self.open_experts is None else rows.index_select(0, self.open_experts)

    def _logits_of_all(self, logits: Tensor) -> Tensor:
        """Return logits (T, E), −∞ for closed experts, from those of the open ones, (T, O)."""
        if self.open_experts is None:
            return logits
        closed = logits.new_full((len(logits), self.num_experts), -inf)
        return closed.index_copy(1, self.open_experts, logits)

    def _numbers_of_open(self, index: Tensor) -> Tensor:
        """Return the numbers of experts, given their places among the open ones."""
        if self.open_experts is None:
            return index
        numbers = F.pad(self.open_experts, (0, 1), value=self.num_experts)
        return numbers[index.clamp(max=len(self.open_experts))]

    def log_scores(self, logits: Tensor) -> Tensor:
        """Return the logarithms of the scores of ``logits``, both (T, E), without underflow."""
        return logits.log_softmax(-1) if self.score_function == "softmax" else F.logsigmoid(logits)

    def _chosen_log_scores(self, chosen_logits: Tensor, logits: Tensor) -> Tensor:
        """Return the logarithms of the chosen scores (T, k), given all logits (T, E)."""
        if self.score_function == "softmax":
            return chosen_logits - logits.logsumexp(-1, keepdim=True)
        return F.logsigmoid(chosen_logits)

    def _normalized_scores(self, chosen_logits: Tensor) -> Tensor:
        """Return the chosen scores (T, k) divided by their sum."""
        # A softmax over the chosen logits is the softmax over all logits, renormalised.
        if self.score_function == "softmax":
            return chosen_logits.softmax(-1)
        return F.logsigmoid(chosen_logits).softmax(-1)

    def _slot_weights(self, chosen_logits: Tensor, logits: Tensor, kept: Tensor | None) -> Tensor:
        """Return the weights of slots, (T, k); 0 for the slots that are not kept.

        Parameters
        ----------
        chosen_logits : Tensor, shape (T, k)
            Logits of the slots' experts.
        logits : Tensor, shape (T, E)
        kept : Tensor of bool, shape (T, k), or None
            Slots that reach an expert; None if all do.
        """
        if not self.normalize:
            weights = self._chosen_log_scores(chosen_logits, logits).exp()
        elif chosen_logits.shape[1] == 1:
            weights = self._unit_weights(chosen_logits, logits)
        elif kept is None:
            weights = self._normalized_scores(chosen_logits)
        else:
            lowest = torch.finfo(chosen_logits.dtype).min
            weights = self._normalized_scores(chosen_logits.masked_fill(~kept, lowest))
            is_single = kept.sum(-1, keepdim=True) == 1
            weights = torch.where(is_single, self._unit_weights(chosen_logits, logits), weights)
        return weights if kept is None else weights.masked_fill(~kept, 0)

    def _unit_weights(self, chosen_logits: Tensor, logits: Tensor) -> Tensor:
        """Return ones (T, k); with ``straight_through``, ones with the log-scores' gradient."""
        # Forward-mode differentiation leaves no sign of itself on the tensor.
        if not (self.straight_through and (logits.requires_grad or needs_native_operators())):
            return torch.ones_like(chosen_logits)
        log_scores = self._chosen_log_scores(chosen_logits, logits)
        return (log_scores - log_scores.detach()).exp()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        # Torch knows no buffer that is there or not.
        if f"{prefix}weight" in state_dict:
            stored = state_dict.get(f"{prefix}open_experts")
            if stored is not None and not local_metadata.get("assign_to_params_buffers", False):
                stored = stored.to(self.weight.device, copy=True)
            self.open_experts = stored
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _replicate_for_data_parallel(self) -> Self:
        return call_observers.copy_to_replica(self, super()._replicate_for_data_parallel())

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"score_function={self.score_function}, jitter_noise={self.jitter_noise}"
            + ("" if self.open_experts is None else f", open={len(self.open_experts)}")
        )
