"""Records of what a model's routers decided, for losses and statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, check_one_of
from tnmoe.nn.routing.counts import count_slots_per_expert
from tnmoe.nn.routing.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.routing.router import CallObserver, Router, RouterResult, call_observers
from tnmoe.nn.routing.token_mask import check_token_mask
from tnmoe.nn.transforms import in_backward
from tnmoe.options import LOSS_SCOPES, BalanceForm, LossScope, ScoreFunction
from tnmoe.system.tables import shortened


@dataclass(frozen=True, kw_only=True)
class RoutingCall:
    """One call of a router.

    A slot is a (token, choice) pair.

    Attributes
    ----------
    name : str
        Name of the router in the model.
    logits : Tensor, shape (T, E)
        With gradients; −∞ for closed experts.
    weights : Tensor, shape (T, k)
        Weight of every slot.
    index : Tensor of int64, shape (T, k)
        Expert of every slot. Index E marks a slot without an expert: its token is padding, or it
        was dropped.
    chosen : Tensor of int64, shape (T, k)
        Experts that tokens chose, before any capacity dropped slots.
    token_mask : Tensor of T entries, or None
        Tokens where it is 0 were ignored.
    sequences : int
        Number of sequences, all of the same length, that the tokens form one after the other.
    score_function : str
        Score function of the router.
    lost_gradient : bool
        Whether the router is trained but the call recorded no gradients.
    open_experts : Tensor of int64, shape (O,), or None
        The experts that were open; None if all were. Losses and statistics ignore the others.

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
    chosen: Tensor
    token_mask: Tensor | None
    sequences: int
    score_function: ScoreFunction
    lost_gradient: bool
    open_experts: Tensor | None = None

    def __repr__(self) -> str:
        tokens, experts = self.logits.shape
        return (
            f"RoutingCall({self.name!r}, tokens={tokens}, experts={experts}, "
            f"choices={self.index.shape[-1]}, sequences={self.sequences})"
        )

    def effective_mask(self, attention_mask: Tensor | None = None) -> Tensor | None:
        """Return which tokens count, as (T,) of bool; None if all do.

        Parameters
        ----------
        attention_mask : Tensor of T entries, any shape, optional
            Tokens where it is 0 do not count. Without it the router's own mask applies.

        Raises
        ------
        InputError
            If the mask does not have T entries or holds negative numbers.
        """
        mask = self.token_mask if attention_mask is None else attention_mask
        return check_token_mask(mask, len(self.logits))

    def among_open(self) -> tuple[Tensor, Tensor]:
        """Return logits (T, O) and chosen experts (T, k) as if there were only the open experts.

        The experts are numbered from 0 to O − 1, and O marks a slot without one.
        """
        if self.open_experts is None:
            return self.logits, self.chosen
        logits = self.logits.index_select(1, self.open_experts)
        return logits, torch.searchsorted(self.open_experts, self.chosen)

    def slots_per_expert(self, attention_mask: Tensor | None = None) -> Tensor:
        """Count the slots that reached each expert, shape (E,).

        Parameters
        ----------
        attention_mask
            As for :meth:`effective_mask`.

        Raises
        ------
        InputError
            If the mask does not have T entries or holds negative numbers.
        """
        mask = self.effective_mask(attention_mask)
        return count_slots_per_expert(self.index, mask, self.logits.shape[-1])


@dataclass
class Routing:
    """Decisions of routers in one or more forward passes.

    Attributes
    ----------
    calls : list of RoutingCall
        In the order of the calls.

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
        scope: LossScope = "batch",
    ) -> Tensor:
        """Return the mean load-balancing loss of the recorded calls.

        Parameters
        ----------
        attention_mask : Tensor with an entry per token, optional
            Tokens where it is 0 do not count; by default the tokens that the routers ignored.
        form : {"switch", "gshard"}
            As for :func:`load_balancing_loss`.
        scope : {"batch", "sequence", "ranks"}
            Balance all tokens of a call together, or the tokens of every sequence, or those of the
            calls of all ranks of a distributed run: see ``all_ranks`` of
            :func:`load_balancing_loss`.

        Raises
        ------
        InputError
            If nothing was recorded, the mask has another size, or a name is unknown.
        """

        def loss_of(call: RoutingCall, **tokens: Any) -> Tensor:
            return load_balancing_loss(
                *call.among_open(),
                call.effective_mask(attention_mask),
                form=form,
                score_function=call.score_function,
                **tokens,
            )

        return self._mean_loss(loss_of, scope)

    def z_loss(self, attention_mask: Tensor | None = None, *, scope: LossScope = "batch") -> Tensor:
        """Return the mean router z-loss of the recorded calls.

        Parameters
        ----------
        attention_mask, scope
            As for :meth:`balance_loss`.

        Raises
        ------
        InputError
            If nothing was recorded, the mask has another size, or the scope is unknown.
        """

        def loss_of(call: RoutingCall, **tokens: Any) -> Tensor:
            mask = call.effective_mask(attention_mask)
            return router_z_loss(call.among_open()[0], mask, **tokens)

        return self._mean_loss(loss_of, scope)

    def counts(self, attention_mask: Tensor | None = None) -> Tensor:
        """Count the slots that reached each expert in every recorded call, shape (calls, E).

        Parameters
        ----------
        attention_mask : Tensor with an entry per token, optional
            Tokens where it is 0 do not count; by default the tokens that the routers ignored.

        Raises
        ------
        InputError
            If nothing was recorded, or routers have different numbers of experts.
        """
        numbers = sorted({call.logits.shape[-1] for call in self.calls})
        if len(numbers) != 1:
            raise InputError(
                "counts() needs routers with one number of experts, got "
                + (", ".join(map(str, numbers)) if numbers else "no call of a router")
            )
        return torch.stack([call.slots_per_expert(attention_mask) for call in self.calls])

    def _mean_loss(self, loss_of: Callable[..., Tensor], scope: LossScope) -> Tensor:
        check_one_of("scope", scope, LOSS_SCOPES)
        losses = [
            loss_of(
                call,
                sequences=call.sequences if scope == "sequence" else 1,
                all_ranks=scope == "ranks",
            )
            for call in self.calls
        ]
        if not losses:
            raise InputError("no routing was recorded: no forward pass reached a Router")
        if torch.is_grad_enabled() and any(call.lost_gradient for call in self.calls):
            warnings.warn(
                "this loss teaches no router: the recorded pass had no gradients, like the first "
                "pass of activation checkpointing with use_reentrant=True",
                stacklevel=3,  # the caller of balance_loss or z_loss
            )
        return torch.stack(losses).mean()


class RoutingRecorder:
    """A recorder of the calls of a model's routers, from ``start`` to ``stop``.

    Parameters
    ----------
    model : Module
        Any module that contains routers.

    Attributes
    ----------
    routing : Routing
        The calls so far.
    paused : bool
        Whether the recorder currently ignores calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routing = Routing()
        self.paused = False
        named = model.named_modules()
        self._routers = {router: name for name, router in named if isinstance(router, Router)}
        self._observers: dict[int, CallObserver] = {
            id(router): _RouterObserver(self, name) for router, name in self._routers.items()
        }

    def start(self) -> None:
        """Begin to record."""
        call_observers.add(self._observers)

    def stop(self) -> None:
        """End the recording."""
        call_observers.remove(self._observers)

    def is_only_recorder(self) -> bool:
        """Return whether, between start and stop, nothing else records the same routers."""
        return all(len(call_observers.values_for(router)) == 1 for router in self._routers)


@dataclass(frozen=True)
class _RouterObserver:
    """An observer that appends the calls of one router to a recorder's routing.

    An object and not a method: torch.compile cannot rebuild a bound method that a context holds.
    """

    recorder: RoutingRecorder
    name: str

    def __call__(self, router: Router, result: RouterResult) -> None:
        if self.recorder.paused or in_backward():
            return
        learns = router.training and router.weight.requires_grad
        self.recorder.routing.calls.append(
            RoutingCall(
                name=self.name,
                logits=result.logits,
                weights=result.weights,
                index=result.index,
                chosen=router.chosen_experts(result.logits, result.index),
                token_mask=result.token_mask,
                sequences=result.sequences,
                score_function=router.score_function,
                lost_gradient=learns and not result.logits.requires_grad,
                open_experts=result.open_experts,
            )
        )


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record the decisions of all routers of a model, for losses and statistics.

    Activation checkpointing repeats forward passes in the backward pass; the block does not record
    them again. With ``use_reentrant=True`` the recorded pass has no gradients, and the losses
    warn about it.

    A block records the calls of its own thread, or task of asyncio, and of ``DataParallel``.
    Other threads may use the model at the same time. A thread that runs in a copy of the block's
    context, as ``asyncio.to_thread`` starts it, belongs to the block.

    Parameters
    ----------
    model : Module
        Any module that contains :class:`Router` modules.

    Yields
    ------
    Routing
        Every forward pass inside the block adds its calls.

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
    recorder = RoutingRecorder(model)
    recorder.start()
    try:
        yield recorder.routing
    finally:
        recorder.stop()
