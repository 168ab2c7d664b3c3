"""A router in which experts choose tokens."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from tnmoe.errors import number_in, one_of
from tnmoe.nn.routing.capacity import room
from tnmoe.nn.routing.router import Router
from tnmoe.nn.transforms import is_transformed
from tnmoe.options import BATCH_SCOPES, BatchScope, ScoreFunction


class ExpertChoiceRouter(Router):
    """Every expert takes the tokens that score highest for it, the same number each.

    Zhou et al., arXiv:2202.09368, section 3.2. The load is balanced by construction; a token goes
    to as many experts as take it, perhaps to none, and then gets 0.

    .. warning::
       Not causal: whether an expert takes a token depends on the tokens after it. In a language
       model that generates, training sees what generation does not. Use it in encoders.

    Parameters
    ----------
    hidden_size, num_experts : int
        Sizes H and E.
    capacity_factor : float
        Experts per token on average: each takes ``ceil(capacity_factor · T / E)`` of them.
    score_function : {"softmax", "sigmoid"}
        What makes scores, over the experts, of a token's logits.
    normalize : bool
        Divide the weights of the experts that take a token by their sum (Komatsuzaki et al.,
        arXiv:2212.05055, section 3). False, as in Zhou et al., weighs by the scores themselves.
    bias, jitter_noise, straight_through
        As in :class:`TopKRouter`.
    scope : {"batch", "sequence"}
        What the T tokens are: all of a call, or those of every sequence.
    device, dtype
        Of the parameters, as for torch's own layers.

    Raises
    ------
    InputError
        If a size, factor or name is none of those that there are.

    Notes
    -----
    Where all experts are the same, a token that any expert takes gets the output of one of them if
    ``normalize`` is on; a token that none takes gets 0, so an upcycled layer does not start as the
    dense one unless ``capacity_factor`` is ``num_experts``.

    How many experts the most wanted token has is the k of the result. On an accelerator this is
    waited for; under ``torch.compile`` and ``torch.func`` k is E.

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
        score_function: ScoreFunction = "softmax",
        normalize: bool = True,
        jitter_noise: float = 0.0,
        *,
        bias: bool = False,
        straight_through: bool = True,
        scope: BatchScope = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, score_function, normalize, straight_through, bias,
            jitter_noise, device, dtype,
        )  # fmt: skip
        one_of("scope", scope, BATCH_SCOPES)
        self.capacity_factor = number_in("capacity_factor", capacity_factor, "(0, inf)")
        self.scope = scope
        self.reset_parameters()

    def _route(self, logits: Tensor, mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
        sequences = sequences if self.scope == "sequence" else 1
        capacity = room(
            self.capacity_factor, self.num_experts, mask, logits.shape[0], sequences, logits
        )
        taken = self._take(self.log_scores(logits), mask, capacity)
        experts = torch.arange(self.num_experts, device=logits.device)
        # Those that take a token first, the number that stands for none last.
        index, order = torch.where(taken, experts, self.num_experts).sort(-1)
        if not (torch.compiler.is_compiling() or is_transformed()):
            width = max(1, int(taken.sum(-1).max())) if taken.shape[0] else 1
            index, order = index[:, :width], order[:, :width]
        return self._weigh(logits.gather(-1, order), logits, index < self.num_experts), index

    @torch.no_grad()
    def _take(self, log_scores: Tensor, mask: Tensor | None, capacity: Tensor) -> Tensor:
        """Which tokens every expert takes, (T, E)."""
        if mask is not None:
            log_scores = log_scores.masked_fill(~mask[:, None], -inf)
        scores = log_scores.view(capacity.shape[0], -1, self.num_experts)
        order = scores.argsort(dim=1, descending=True, stable=True)
        taken = (order.argsort(1) < capacity[:, None, None]).view_as(log_scores)
        return taken if mask is None else taken & mask[:, None]

    def choices(self, logits: Tensor, index: Tensor) -> Tensor:
        return index

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, "
            f"normalize={self.normalize}, scope={self.scope}"
        )
