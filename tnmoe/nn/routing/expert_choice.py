"""The router in which experts choose tokens."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from tnmoe.errors import check_number_in, check_one_of
from tnmoe.nn.routing.capacity import expert_capacity, sequence_lengths
from tnmoe.nn.routing.router import Router
from tnmoe.nn.transforms import is_transformed
from tnmoe.options import BATCH_SCOPES, BatchScope, ScoreFunction


class ExpertChoiceRouter(Router):
    """A router in which every expert takes the tokens that score highest for it.

    All experts take the same number of tokens, so the load is balanced by construction (Zhou et
    al., arXiv:2202.09368, section 3.2). A token goes to every expert that takes it. A token that no
    expert takes gets 0.

    .. warning::
       Not causal: whether an expert takes a token depends on the tokens after it. A language model
       that generates would see in training what it cannot see in generation. Use this router in
       encoders.

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    capacity_factor : float
        Experts per token on average: each expert takes ``ceil(capacity_factor · T / E)`` tokens.
    score_function : {"softmax", "sigmoid"}
        Turns a token's logits into scores of the experts.
    normalize : bool
        Divide the weights of a token's experts by their sum (Komatsuzaki et al., arXiv:2212.05055,
        section 3). With False, as in Zhou et al., the weights are the scores themselves.
    jitter_noise, bias, straight_through
        As in :class:`TopKRouter`.
    scope : {"batch", "sequence"}
        What the T tokens are: all tokens of a call, or the tokens of one sequence.
    device, dtype
        Of the parameters, as for torch's own layers.

    Raises
    ------
    InputError
        If a size or factor is out of range, or a name is unknown.

    Notes
    -----
    Where all experts are the same and ``normalize`` is on, a token that any expert takes gets the
    output of one expert. Since a token that no expert takes gets 0, an upcycled layer starts as
    the dense network only if ``capacity_factor`` is ``num_experts``.

    The k of the result is the largest number of experts that take one token. On an accelerator
    the router waits for this number. Under ``torch.compile`` and ``torch.func`` k is E.

    Examples
    --------
    >>> import torch
    >>> router = ExpertChoiceRouter(8, num_experts=4, capacity_factor=2)
    >>> _, _, index = router(torch.randn(6, 8))
    >>> torch.bincount(index.flatten(), minlength=5)[:4]
    tensor([3, 3, 3, 3])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        *,
        score_function: ScoreFunction = "softmax",
        normalize: bool = True,
        jitter_noise: float = 0.0,
        bias: bool = False,
        straight_through: bool = True,
        scope: BatchScope = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, score_function=score_function, normalize=normalize,
            jitter_noise=jitter_noise, bias=bias, straight_through=straight_through,
            device=device, dtype=dtype,
        )  # fmt: skip
        check_one_of("scope", scope, BATCH_SCOPES)
        self.capacity_factor = check_number_in("capacity_factor", capacity_factor, "(0, inf)")
        self.scope = scope
        self.reset_parameters()

    def chosen_experts(self, logits: Tensor, index: Tensor) -> Tensor:
        return index

    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        sequences = sequences if self.scope == "sequence" else 1
        lengths = sequence_lengths(mask, logits, sequences)
        count = logits.shape[1]
        capacity = expert_capacity(self.capacity_factor, count, lengths)
        taken = self._choose_tokens(self.log_scores(logits), mask, capacity)
        experts = torch.arange(count, device=logits.device)
        # Sorted, the experts that take a token come first, and number `count` comes last.
        index, order = torch.where(taken, experts, count).sort(-1)
        if not (torch.compiler.is_compiling() or is_transformed()):
            width = max(1, int(taken.sum(-1).max())) if taken.shape[0] else 1
            index, order = index[:, :width], order[:, :width]
        kept = index < count
        return self._slot_weights(logits.gather(-1, order), logits, kept), index

    @torch.no_grad()
    def _choose_tokens(self, log_scores: Tensor, mask: Tensor | None, capacity: Tensor) -> Tensor:
        """Return which tokens every expert takes, (T, E)."""
        if mask is not None:
            log_scores = log_scores.masked_fill(~mask[:, None], -inf)
        scores = log_scores.view(capacity.shape[0], -1, log_scores.shape[1])
        order = scores.argsort(dim=1, descending=True, stable=True)
        taken = (order.argsort(1) < capacity[:, None, None]).view_as(log_scores)
        return taken if mask is None else taken & mask[:, None]

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, "
            f"normalize={self.normalize}, scope={self.scope}"
        )
