"""What the routers of a model decided: recorded for losses and statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, one_of
from tnmoe.nn.routing.capacity import check_mask
from tnmoe.nn.routing.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.routing.router import Router, recorders
from tnmoe.nn.transforms import in_backward
from tnmoe.options import BATCH_SCOPES, BalanceForm, BatchScope, ScoreFunction
from tnmoe.system.tables import shortened


@dataclass(frozen=True)
class RoutingCall:
    """One call of a router.

    Attributes
    ----------
    name : str
        The router's, in the model.
    logits : Tensor, shape (T, E)
        With gradients.
    weights, index : Tensor, shapes (T, k)
        Weights and experts; E for none.
    choices : Tensor, shape (T, k)
        Experts asked for, whether or not they had room.
    token_mask : Tensor of T entries, or None
        Tokens where it is 0 were ignored.
    sequences : int
        The tokens were so many sequences of the same length.
    score_function : str
        The router's.
    lost_gradient : bool
        The router is in training, but the call was without gradients.

    Examples
    --------
    >>> from tnmoe import nn
    >>> router = nn.TopKRouter(8, 4, top_k=2)
    >>> with nn.record_routing(router) as routing:
    ...     _ = router(torch.randn(100, 8))
    >>> call = routing.calls[0]
    >>> call.logits.shape, call.index.shape
    (torch.Size([100, 4]), torch.Size([100, 2]))
    """

    name: str
    logits: Tensor
    weights: Tensor
    index: Tensor
    choices: Tensor
    token_mask: Tensor | None
    sequences: int
    score_function: ScoreFunction
    lost_gradient: bool

    def __repr__(self) -> str:
        tokens, experts = self.logits.shape
        return (
            f"RoutingCall({self.name!r}, tokens={tokens}, experts={experts}, "
            f"choices={self.index.shape[-1]}, sequences={self.sequences})"
        )

    def counted(self, attention_mask: Tensor | None) -> Tensor | None:
        """Tokens that count, as (T,) of bool: ``attention_mask``, else the router's own mask."""
        mask = self.token_mask if attention_mask is None else attention_mask
        return check_mask(mask, len(self.logits))


@dataclass
class Routing:
    """Decisions of routers in one or more forward passes.

    Attributes
    ----------
    calls : list of RoutingCall
        In the order in which they came.

    Examples
    --------
    >>> from tnmoe import nn
    >>> router = nn.TopKRouter(8, 4)
    >>> with nn.record_routing(router) as routing:
    ...     _ = router(torch.randn(100, 8))
    >>> routing.counts().sum().item()
    100
    >>> loss = 0.01 * routing.balance_loss() + 0.001 * routing.z_loss()
    """

    calls: list[RoutingCall] = field(default_factory=list)

    def __repr__(self) -> str:
        tokens = sum(len(call.logits) for call in self.calls)
        routers = list(dict.fromkeys(call.name for call in self.calls))
        return f"Routing(calls={len(self.calls)}, tokens={tokens}, routers={shortened(routers)})"

    def balance_loss(
        self,
        attention_mask: Tensor | None = None,
        *,
        form: BalanceForm = "switch",
        scope: BatchScope = "batch",
    ) -> Tensor:
        """Mean load-balancing loss of the recorded calls.

        Parameters
        ----------
        attention_mask : Tensor with an entry per token, optional
            Tokens where it is 0 do not count; by default those that the routers ignored.
        form : {"switch", "gshard"}
            As for :func:`load_balancing_loss`.
        scope : {"batch", "sequence"}
            Whether all tokens of a call are to be balanced, or those of every sequence.

        Raises
        ------
        InputError
            If nothing was recorded, the mask has another size, or a name is unknown.
        """
        one_of("scope", scope, BATCH_SCOPES)
        return self._mean(
            [
                load_balancing_loss(
                    call.logits,
                    call.choices,
                    call.counted(attention_mask),
                    form=form,
                    score_function=call.score_function,
                    sequences=call.sequences if scope == "sequence" else 1,
                )
                for call in self.calls
            ]
        )

    def z_loss(
        self, attention_mask: Tensor | None = None, *, scope: BatchScope = "batch"
    ) -> Tensor:
        """Mean router z-loss of the recorded calls.

        Parameters
        ----------
        attention_mask, scope
            As for :meth:`balance_loss`.

        Raises
        ------
        InputError
            If nothing was recorded, the mask has another size, or the scope is unknown.
        """
        one_of("scope", scope, BATCH_SCOPES)
        return self._mean(
            [
                router_z_loss(
                    call.logits,
                    call.counted(attention_mask),
                    sequences=call.sequences if scope == "sequence" else 1,
                )
                for call in self.calls
            ]
        )

    def counts(self, attention_mask: Tensor | None = None) -> Tensor:
        """Slots each expert received, per recorded call, shape (calls, E).

        Parameters
        ----------
        attention_mask : Tensor with an entry per token, optional
            Tokens where it is 0 do not count; by default those that the routers ignored.

        Raises
        ------
        InputError
            If nothing was recorded, or routers have different numbers of experts.
        """
        numbers = sorted({call.logits.shape[-1] for call in self.calls})
        if len(numbers) != 1:
            raise InputError(
                "counts are of routers with one number of experts, got "
                + (", ".join(map(str, numbers)) if numbers else "no call of a router")
            )
        rows = []
        for call in self.calls:
            mask = call.counted(attention_mask)
            kept = call.index if mask is None else call.index[mask]
            experts = call.logits.shape[-1]
            rows.append(torch.bincount(kept.reshape(-1), minlength=experts + 1)[:experts])
        return torch.stack(rows)

    def _mean(self, losses: list[Tensor]) -> Tensor:
        if not losses:
            raise InputError("no routing was recorded: no forward pass reached a Router")
        if torch.is_grad_enabled() and any(call.lost_gradient for call in self.calls):
            warnings.warn(
                "this loss teaches no router: the recorded pass was without gradients, as the "
                "first one of activation checkpointing with use_reentrant=True is",
                stacklevel=3,
            )
        return torch.stack(losses).mean()


class Recording:
    """Fills a Routing with the calls of a model's routers, from start to stop.

    Parameters
    ----------
    model : Module
        Anything that contains routers.

    Attributes
    ----------
    routing : Routing
    paused : bool
        Whether calls are left out for the time being.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routing = Routing()
        self.paused = False
        named = model.named_modules()
        self._routers = {each: name for name, each in named if isinstance(each, Router)}
        self._recorders: dict[int, Callable[..., None]] = {
            id(router): _Recorder(self, name) for router, name in self._routers.items()
        }

    def start(self) -> None:
        recorders.put(self._recorders)

    def stop(self) -> None:
        recorders.take(self._recorders)

    def is_alone(self) -> bool:
        """Whether, before it stops, nothing else records the same routers."""
        return all(len(recorders.of(router)) == 1 for router in self._routers)


@dataclass(frozen=True)
class _Recorder:
    """Tells a Recording of the calls of one router."""

    recording: Recording
    name: str

    def __call__(
        self,
        router: Router,
        logits: Tensor,
        weights: Tensor,
        index: Tensor,
        token_mask: Tensor | None,
        sequences: int,
    ) -> None:
        if self.recording.paused or in_backward():
            return
        choices = router.choices(logits, index)
        learns = router.training and router.weight.requires_grad
        self.recording.routing.calls.append(
            RoutingCall(
                self.name,
                logits,
                weights,
                index,
                choices,
                token_mask,
                sequences,
                router.score_function,
                learns and not logits.requires_grad,
            )
        )


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record the decisions of all routers of a model, for losses and statistics.

    What activation checkpointing calls again in a backward pass is not recorded again. With its
    ``use_reentrant=True`` the pass that is recorded has no gradients, which losses warn of.

    A block records the calls of its own thread, or task of asyncio, and of ``DataParallel``; other
    threads may use the model meanwhile. A thread that runs in a copy of the block's context, as
    those of ``asyncio.to_thread`` do, belongs to it.

    Parameters
    ----------
    model : Module
        Anything that contains :class:`Router` modules.

    Yields
    ------
    Routing
        Filled by every forward pass inside the block.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, MPOMoE, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, sites=2))
    >>> with record_routing(layer) as routing:
    ...     output = layer(torch.randn(2, 5, 8))
    >>> routing.counts().sum()
    tensor(10)
    """
    recording = Recording(model)
    recording.start()
    try:
        yield recording.routing
    finally:
        recording.stop()
