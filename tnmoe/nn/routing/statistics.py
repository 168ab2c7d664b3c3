"""How a model's routers use their experts: statistics of a pass, and their history in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import exp

import numpy as np
import torch
from torch import Tensor

from tnmoe.errors import InputError, positive_int
from tnmoe.nn.routing.counts import choices_per_token
from tnmoe.nn.routing.losses import counted_logits, normalized_scores
from tnmoe.nn.routing.record import Routing, RoutingCall
from tnmoe.system.tables import shortened


class RouterCollapseWarning(UserWarning):
    """Nearly all tokens go to the same few experts.

    Examples
    --------
    >>> import warnings
    >>> warnings.filterwarnings("error", category=RouterCollapseWarning)
    """


@dataclass(frozen=True)
class RouterStatistics:
    """What one router did with the tokens of a pass, padding aside.

    Attributes
    ----------
    load : Tensor, shape (E,)
        Share of the choices that asked for each expert; sums to 1.
    importance : Tensor, shape (E,)
        Mean score of each expert, a token's scores summing to 1.
    entropy : Tensor, scalar
        Mean entropy of a token's scores, in nats: log E where the router has no preference.
    dropped : Tensor, scalar
        Share of the choices that were not followed, for want of room or by policy.
    untouched : Tensor, scalar
        Share of the tokens that went to no expert.
    max_violation : Tensor, scalar
        Load of the busiest expert over the mean load, minus 1: 0 at balance
        (Wang et al., arXiv:2408.15664, equation 4).

    Examples
    --------
    >>> from tnmoe import nn
    >>> router = nn.TopKRouter(8, 4)
    >>> with nn.record_routing(router) as routing:
    ...     _ = router(torch.randn(100, 8))
    >>> (statistics,) = nn.routing_statistics(routing).values()
    >>> statistics.load.shape, round(statistics.load.sum().item(), 3)
    (torch.Size([4]), 1.0)
    """

    load: Tensor
    importance: Tensor
    entropy: Tensor
    dropped: Tensor
    untouched: Tensor
    max_violation: Tensor


STATISTICS = tuple(entry.name for entry in fields(RouterStatistics))


@torch.no_grad()
def routing_statistics(
    routing: Routing, attention_mask: Tensor | None = None
) -> dict[str, RouterStatistics]:
    """Statistics of every router that was recorded, tokens of several calls taken together.

    Parameters
    ----------
    routing : Routing
        What :func:`record_routing` recorded.
    attention_mask : Tensor with an entry per token, optional
        Tokens where it is 0 do not count; by default those that the routers ignored.

    Returns
    -------
    dict
        By the routers' names. Tensors stay on their device; nothing is waited for.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import TopKRouter, record_routing
    >>> router = TopKRouter(8, 4)
    >>> with record_routing(router) as routing:
    ...     _ = router(torch.randn(16, 8))
    >>> float(routing_statistics(routing)[""].load.sum())
    1.0
    """
    by_name: dict[str, list[tuple[Tensor, RouterStatistics]]] = {}
    for call in routing.calls:
        by_name.setdefault(call.name, []).append(_of_call(call, attention_mask))
    return {name: _together(calls) for name, calls in by_name.items()}


def _together(calls: list[tuple[Tensor, RouterStatistics]]) -> RouterStatistics:
    """Means of statistics, weighted by tokens."""
    tokens = torch.stack([count for count, _ in calls])
    shares = tokens / tokens.sum().clamp(min=1)
    means = (
        sum(share * getattr(each, name) for share, (_, each) in zip(shares, calls, strict=True))
        for name in STATISTICS
    )
    return RouterStatistics(*means)


def _of_call(call: RoutingCall, attention_mask: Tensor | None) -> tuple[Tensor, RouterStatistics]:
    """How many tokens counted, and their statistics."""
    mask = call.counted(attention_mask)
    logits = counted_logits(call.logits.float(), mask)
    experts = logits.shape[-1]
    tokens = logits.new_ones(len(logits)) if mask is None else mask.float()
    share = tokens / tokens.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        # No matrix product, which autocast would do in half precision.
        return (share.view(-1, *[1] * (values.ndim - 1)) * values).sum(0)

    asked = mean(choices_per_token(call.choices, experts))
    # A difference of integers: where nothing was dropped it is 0, not rounding.
    missed = mean((call.choices < experts).sum(-1) - (call.index < experts).sum(-1))
    load = asked / asked.sum().clamp(min=1e-9)
    scores = normalized_scores(logits, call.score_function)
    return tokens.sum(), RouterStatistics(
        load=load,
        importance=mean(scores),
        entropy=mean(torch.special.entr(scores).sum(-1)),
        dropped=missed / asked.sum().clamp(min=1e-9),
        untouched=mean((call.index == experts).all(-1)),
        max_violation=experts * load.max() - 1,
    )


class RoutingHistory(Mapping[str, dict[str, np.ndarray]]):
    """Statistics of all routers, step by step, and a warning if one collapses.

    A mapping from routers' names to their statistics, as arrays whose first axis is the steps;
    ``tnmoe.plot.routing_statistic`` and ``tnmoe.plot.load_history`` draw it.

    A router has collapsed when, over ``window`` steps, its load is spread over hardly more
    experts than one token needs: exp(entropy of the load) < k + (E − k) / 8. It is warned about
    once per router.

    Parameters
    ----------
    window : int
        Steps whose mean load is looked at; every so many steps, so that an accelerator is not
        waited for at each.

    Raises
    ------
    InputError
        If ``window`` is not a positive integer.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import TopKRouter, record_routing
    >>> router, history = TopKRouter(8, 4), RoutingHistory()
    >>> for step in range(3):
    ...     with record_routing(router) as routing:
    ...         _ = router(torch.randn(16, 8))
    ...     history.append(routing)
    >>> history[""]["load"].shape, history[""]["entropy"].shape
    ((3, 4), (3,))
    """

    def __init__(self, window: int = 50) -> None:
        self.window = positive_int("window", window)
        self._steps: dict[str, list[RouterStatistics]] = {}
        self._choices: dict[str, int] = {}
        self._collapsed: set[str] = set()

    def __repr__(self) -> str:
        steps = max(map(len, self._steps.values()), default=0)
        return f"RoutingHistory(steps={steps}, routers={shortened(self)})"

    def append(self, routing: Routing, attention_mask: Tensor | None = None) -> None:
        """Add a step's statistics.

        Parameters
        ----------
        routing, attention_mask
            As for :func:`routing_statistics`.

        Warns
        -----
        RouterCollapseWarning
            Once for every router that has collapsed.
        """
        for call in routing.calls:
            self._choices[call.name] = call.choices.shape[1]
        for name, statistics in routing_statistics(routing, attention_mask).items():
            steps = self._steps.setdefault(name, [])
            steps.append(statistics)
            if len(steps) % self.window == 0 and name not in self._collapsed:
                self._look_at(name, steps[-self.window :])

    def _look_at(self, name: str, steps: list[RouterStatistics]) -> None:
        load = torch.stack([step.load for step in steps]).sum(0)
        total, experts, needed = float(load.sum()), len(load), self._choices[name]
        if total == 0 or experts <= needed:
            return
        used = exp(float(torch.special.entr(load / total).sum()))
        if used < needed + (experts - needed) / 8:
            self._collapsed.add(name)
            warnings.warn(
                f"router {name or '(the model itself)'} has collapsed: in the last {len(steps)} "
                f"steps its tokens used about {used:.1f} of {experts} experts; a larger weight of "
                "the balance loss, a load bias or a capacity would spread them",
                RouterCollapseWarning,
                stacklevel=4,
            )

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        """Every statistic of a router as an array whose first axis is the steps.

        Raises
        ------
        InputError
            If no such router was recorded.
        """
        if name not in self._steps:
            raise InputError(f"no router {name!r} was recorded, only {list(self)}")
        return {
            key: torch.stack([getattr(step, key) for step in self._steps[name]]).cpu().numpy()
            for key in STATISTICS
        }

    def __iter__(self) -> Iterator[str]:
        """Names of the routers."""
        return iter(self._steps)

    def __len__(self) -> int:
        """Number of routers."""
        return len(self._steps)
