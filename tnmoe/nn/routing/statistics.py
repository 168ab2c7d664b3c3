"""Statistics of how a model's routers use their experts, and their history in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import exp

import numpy as np
import torch
from torch import Tensor

from tnmoe.errors import InputError, check_positive_int
from tnmoe.nn.routing.counts import count_slots_per_token
from tnmoe.nn.routing.losses import normalized_scores
from tnmoe.nn.routing.record import Routing, RoutingCall
from tnmoe.nn.routing.token_mask import mean_over_tokens, token_weights, zero_masked
from tnmoe.system.tables import shortened

# A router has collapsed when its tokens use less than this share of the experts that they could
# use beyond the k that one token needs.
_COLLAPSED_SHARE = 1 / 8


class RouterCollapseWarning(UserWarning):
    """A warning that nearly all tokens go to the same few experts.

    Examples
    --------
    >>> import warnings
    >>> warnings.filterwarnings("error", category=RouterCollapseWarning)
    """


@dataclass(frozen=True)
class RouterStatistics:
    """Statistics of one router over the tokens of a pass, without padding.

    A slot is a (token, choice) pair.

    Attributes
    ----------
    load : Tensor, shape (E,)
        Share of the slots that chose each expert, before any capacity; sums to 1. It is 0 for
        closed experts.
    importance : Tensor, shape (E,)
        Mean score of each expert, where a token's scores sum to 1. It is 0 for closed experts.
    entropy : Tensor, scalar
        Mean entropy of a token's scores, in nats: log E where the router has no preference.
    dropped : Tensor, scalar
        Share of the slots that the capacity or the policy for second experts dropped.
    untouched : Tensor, scalar
        Share of the tokens that went to no expert.
    max_violation : Tensor, scalar
        Largest load divided by the mean load, minus 1: 0 at balance
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
    """Compute statistics of every recorded router, over the tokens of all its calls.

    Parameters
    ----------
    routing : Routing
        What :func:`record_routing` recorded.
    attention_mask : Tensor with an entry per token, optional
        Tokens where it is 0 do not count; by default the tokens that the routers ignored.

    Returns
    -------
    dict from str to RouterStatistics
        By the routers' names. Tensors stay on their device, and the function does not wait for
        the device.

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
        by_name.setdefault(call.name, []).append(_call_statistics(call, attention_mask))
    return {name: _weighted_mean(calls) for name, calls in by_name.items()}


def _weighted_mean(calls: list[tuple[Tensor, RouterStatistics]]) -> RouterStatistics:
    """Average statistics, weighted by their numbers of tokens."""
    tokens = torch.stack([count for count, _ in calls])
    shares = tokens / tokens.sum().clamp(min=1)
    means = (
        sum(
            share * getattr(statistics, name)
            for share, (_, statistics) in zip(shares, calls, strict=True)
        )
        for name in STATISTICS
    )
    return RouterStatistics(*means)


def _call_statistics(
    call: RoutingCall, attention_mask: Tensor | None
) -> tuple[Tensor, RouterStatistics]:
    """Return how many tokens of a call count, and their statistics."""
    mask = call.effective_mask(attention_mask)
    logits, places = call.among_open()
    logits = zero_masked(logits.float(), mask)
    experts = logits.shape[-1]
    tokens = logits.new_full((), len(logits)) if mask is None else mask.float().sum()
    weights = token_weights(logits, mask)

    def mean(values: Tensor) -> Tensor:
        return mean_over_tokens(values, weights)[0]

    def of_all(values: Tensor) -> Tensor:
        if call.open_experts is None:
            return values
        return values.new_zeros(call.logits.shape[-1]).index_copy(0, call.open_experts, values)

    chosen = mean(count_slots_per_token(places, experts))
    is_routed = call.index < call.logits.shape[-1]
    # A difference of integers: where nothing was dropped it is 0, not rounding.
    dropped = mean((places < experts).sum(-1) - is_routed.sum(-1))
    load = chosen / chosen.sum().clamp(min=1e-9)
    scores = normalized_scores(logits, call.score_function)
    return tokens, RouterStatistics(
        load=of_all(load),
        importance=of_all(mean(scores)),
        entropy=mean(torch.special.entr(scores).sum(-1)),
        dropped=dropped / chosen.sum().clamp(min=1e-9),
        untouched=mean((~is_routed).all(-1)),
        max_violation=experts * load.max() - 1,
    )


class RoutingHistory(Mapping[str, dict[str, np.ndarray]]):
    """The statistics of all routers step by step, with a warning if a router collapses.

    A mapping from routers' names to their statistics, as arrays whose first axis is the steps;
    ``tnmoe.plot.routing_statistic`` and ``tnmoe.plot.load_history`` draw it.

    A router has collapsed when, over ``window`` steps, its tokens use hardly more experts than one
    token needs: exp(entropy of the load) < k + (E − k) / 8. Closed experts do not count in E. The
    history warns once per router.

    Parameters
    ----------
    window : int
        Number of steps between two checks. A check takes the mean load of the steps since the last
        check. It waits for an accelerator, which would cost too much at every step.

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
        self.window = check_positive_int("window", window)
        self._steps: dict[str, list[RouterStatistics]] = {}
        # Experts per token, and experts that a token can choose among.
        self._choices: dict[str, tuple[int, int]] = {}
        self._collapsed: set[str] = set()

    def __repr__(self) -> str:
        steps = max(map(len, self._steps.values()), default=0)
        return f"RoutingHistory(steps={steps}, routers={shortened(self)})"

    def append(self, routing: Routing, attention_mask: Tensor | None = None) -> None:
        """Append the statistics of one step.

        Parameters
        ----------
        routing, attention_mask
            As for :func:`routing_statistics`.

        Warns
        -----
        RouterCollapseWarning
            Once for every router that has collapsed.

        Raises
        ------
        InputError
            If a router has another number of experts than at earlier steps. Nothing is appended.
        """
        for call in routing.calls:
            self._check_experts(call)
        for call in routing.calls:
            self._choices[call.name] = call.chosen.shape[1], call.among_open()[0].shape[1]
        for name, statistics in routing_statistics(routing, attention_mask).items():
            steps = self._steps.setdefault(name, [])
            steps.append(statistics)
            if len(steps) % self.window == 0 and name not in self._collapsed:
                self._warn_if_collapsed(name, steps[-self.window :])

    def _check_experts(self, call: RoutingCall) -> None:
        experts, steps = call.logits.shape[1], self._steps.get(call.name)
        if steps and len(steps[0].load) != experts:
            raise InputError(
                f"router {call.name or '(the model itself)'} had {len(steps[0].load)} experts and "
                f"has {experts} now: begin a new RoutingHistory"
            )

    def _warn_if_collapsed(self, name: str, steps: list[RouterStatistics]) -> None:
        load = torch.stack([step.load for step in steps]).sum(0)
        total, (top_k, experts) = float(load.sum()), self._choices[name]
        if total == 0 or experts <= top_k:
            return
        used = exp(float(torch.special.entr(load / total).sum()))
        if used < top_k + (experts - top_k) * _COLLAPSED_SHARE:
            self._collapsed.add(name)
            warnings.warn(
                f"router {name or '(the model itself)'} has collapsed: in the last {len(steps)} "
                f"steps its tokens used about {used:.1f} of {experts} experts; a larger weight of "
                "the balance loss, a load bias or a capacity would spread them",
                RouterCollapseWarning,
                stacklevel=4,
            )

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        """Return every statistic of a router as an array whose first axis is the steps.

        Raises
        ------
        InputError
            If no router of that name was recorded.
        """
        if name not in self._steps:
            raise InputError(f"no router {name!r} was recorded, only {list(self)}")
        return {
            key: torch.stack([getattr(step, key) for step in self._steps[name]]).cpu().numpy()
            for key in STATISTICS
        }

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the routers."""
        return iter(self._steps)

    def __len__(self) -> int:
        """Return the number of routers."""
        return len(self._steps)
