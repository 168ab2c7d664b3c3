"""The MoE layer: a router and experts, in the place of a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.experts import Experts
from tnmoe.nn.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.router import TopKRouter


class MPOMoE(nn.Module):
    """A mixture of experts, (..., H) → (..., H).

    Parameters
    ----------
    router : TopKRouter
        Chooses experts per token.
    experts : Experts
        ``MPOExperts``, or ``DenseExperts`` for an ordinary mixture.

    Raises
    ------
    InputError
        If the two differ in their numbers of experts or hidden sizes.
    """

    def __init__(self, router: TopKRouter, experts: Experts) -> None:
        super().__init__()
        routed = (router.num_experts, router.hidden_size)
        offered = (experts.num_experts, experts.hidden_size)
        if routed != offered:
            raise InputError(
                f"the router is for {routed[0]} experts of hidden size {routed[1]}, "
                f"the experts are {offered[0]} of hidden size {offered[1]}"
            )
        self.router = router
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route every token through its experts; (..., H) → (..., H)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.router(tokens)
        return self.experts(tokens, index, weights).view_as(hidden_states)


@dataclass
class Routing:
    """What the routers of a model decided in one or more forward passes.

    Attributes
    ----------
    names : list of str
        The routers, one entry per call.
    logits : list of Tensor, shapes (T, E)
        Scores, with gradients.
    index : list of Tensor, shapes (T, k)
        Chosen experts.
    """

    names: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)

    def balance_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """Mean load-balancing loss of the recorded calls."""
        return self._mean(
            [
                load_balancing_loss(logits, index, attention_mask)
                for logits, index in zip(self.logits, self.index, strict=True)
            ]
        )

    def z_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """Mean router z-loss of the recorded calls."""
        return self._mean([router_z_loss(logits, attention_mask) for logits in self.logits])

    def counts(self, attention_mask: Tensor | None = None) -> Tensor:
        """Slots each expert received, per recorded call, shape (calls, E)."""
        rows = []
        for logits, index in zip(self.logits, self.index, strict=True):
            kept = index if attention_mask is None else index[attention_mask.reshape(-1) != 0]
            rows.append(torch.bincount(kept.reshape(-1), minlength=logits.shape[-1]))
        return torch.stack(rows)

    @staticmethod
    def _mean(losses: list[Tensor]) -> Tensor:
        if not losses:
            raise InputError("no routing was recorded: no forward pass reached a TopKRouter")
        return torch.stack(losses).mean()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record the decisions of all routers of a model, for losses and statistics.

    Parameters
    ----------
    model : Module
        Anything that contains :class:`TopKRouter` modules.

    Yields
    ------
    Routing
        Filled by every forward pass inside the block.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, sites=2))
    >>> with record_routing(layer) as routing:
    ...     output = layer(torch.randn(2, 5, 8))
    >>> routing.counts().sum()
    tensor(10)
    """
    routing = Routing()

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            routing.names.append(name)
            routing.logits.append(output[0])
            routing.index.append(output[2])

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if isinstance(module, TopKRouter)
    ]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
