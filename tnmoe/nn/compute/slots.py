"""Slots, i.e. (token, choice) pairs: their order by expert, their dispatch, their combination."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tnmoe.nn.transforms import cast, needs_native_operators


@dataclass(frozen=True)
class Groups:
    """Slots sorted by expert, so that the rows of each expert are adjacent.

    Attributes
    ----------
    experts : Tensor of int64, shape (N,)
        Expert of every row.
    offsets : Tensor of int32, shape (E,)
        Where the rows of every expert end. On an accelerator they stay there.
    layer_slots : int
        Number of slots of the whole layer, for which routes are planned. It is N, except in a
        :meth:`part`.
    order : Tensor of int64, shape (N,)
        Slot at every row.
    inverse : Tensor of int64, shape (N,)
        Row of every slot.

    Examples
    --------
    >>> groups = Groups.of(torch.tensor([2, 0, 2]), num_experts=3)
    >>> groups.experts, groups.order
    (tensor([0, 2, 2]), tensor([1, 0, 2]))
    >>> groups.offsets.tolist()
    [1, 1, 3]
    """

    experts: Tensor = field(repr=False)
    offsets: Tensor
    layer_slots: int
    order: Tensor = field(repr=False)
    inverse: Tensor = field(repr=False)

    @classmethod
    def of(cls, expert_of_slot: Tensor, num_experts: int) -> Groups:
        """Sort slots by their experts.

        Parameters
        ----------
        expert_of_slot : Tensor of int64, shape (N,)
            Token by token, choice by choice. Index E marks a slot without an expert; these slots
            come last.
        num_experts : int
            Number of experts E.
        """
        slots = expert_of_slot.shape[0]
        experts, order = expert_of_slot.sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(slots, device=order.device)
        # Unlike bincount, a search in the sorted experts is deterministic and never synchronises.
        indices = torch.arange(num_experts, device=order.device)
        ends = torch.searchsorted(experts, indices, right=True)
        return cls(experts, ends.to(torch.int32), slots, order, inverse)

    @classmethod
    def of_one_expert(cls, rows: int, device: torch.device) -> Groups:
        """Return the groups of rows that all belong to one expert, which is number 0.

        Parameters
        ----------
        rows : int
            Number of rows.
        device : torch.device
            Device of the tensors.
        """
        numbers = torch.arange(rows, device=device)
        ends = torch.full((1,), rows, dtype=torch.int32, device=device)
        return cls(torch.zeros_like(numbers), ends, rows, numbers, numbers)

    @property
    def used(self) -> Tensor:
        """Which experts have rows, (E,) of bool; does not synchronise with an accelerator."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)) > 0

    @cached_property
    def blocks(self) -> list[tuple[int, slice]]:
        """Experts that have rows, and those rows. Synchronises with an accelerator."""
        return list(blocks_of(self.offsets))

    def part(self, start: int, stop: int) -> Groups:
        """Return the rows from ``start`` to ``stop``, numbered from 0 as the slots of a part.

        Routes stay those that are planned for the whole layer.
        """
        numbers = torch.arange(stop - start, device=self.order.device)
        ends = self.offsets.clamp(start, stop) - start
        return Groups(self.experts[start:stop], ends, self.layer_slots, numbers, numbers)

    def head(self, rows: int) -> Groups:
        """Return the first ``rows`` rows; routes are planned for these alone."""
        return replace(self.part(0, rows), layer_slots=rows)


@dataclass(frozen=True)
class UnsortedSlots:
    """A few slots in the order of tokens, for which sorting would cost more than it saves.

    Attributes
    ----------
    experts : Tensor of int64, shape (N,)
        Expert of every slot, token by token, choice by choice. All slots have one.
    """

    experts: Tensor


# How rows of slots lie, and which experts they belong to.
SlotOrder = Groups | UnsortedSlots


@dataclass(frozen=True)
class DenseDispatch:
    """A table of tokens and experts, for code that may not depend on how many slots experts have.

    Every expert has a row for every token: zeros where the token did not choose the expert.

    Attributes
    ----------
    chosen : Tensor of bool, shape (T, E, 1)
        Whether a token chose an expert.
    weights : Tensor, shape (T, E)
        Weight of every expert in a token's sum.
    """

    chosen: Tensor
    weights: Tensor

    @classmethod
    def of(cls, index: Tensor, weights: Tensor, num_experts: int) -> DenseDispatch:
        """Build the table from the experts and weights of tokens, both (T, k).

        Only indices from 0 to E − 1 mark an expert.
        """
        chosen = index[..., None] == torch.arange(num_experts, device=index.device)
        return cls(chosen.any(1)[..., None], torch.where(chosen, weights[..., None], 0).sum(1))

    @property
    def used(self) -> Tensor:
        """Which experts have tokens, (E,) of bool."""
        return self.chosen[..., 0].any(0)

    def dispatch(self, states: Tensor) -> Tensor:
        """Give every expert a row for every token: (T, H) → (T, E, H)."""
        return self.mask(states[:, None])

    def mask(self, rows: Tensor) -> Tensor:
        """Set rows (T, E, n), and their gradients, to zero where the expert was not chosen."""
        return torch.where(self.chosen, rows, 0)

    def combine(self, outputs: Tensor) -> Tensor:
        """Sum the weighted outputs of every token: (T, E, H) → (T, H)."""
        return (self.mask(outputs) * self.weights[..., None]).sum(1)


def blocks_of(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and those rows. Synchronises with an accelerator."""
    for expert, (start, stop) in enumerate(pairwise([0, *offsets.tolist()])):
        if stop > start:
            yield expert, slice(start, stop)


def dispatch(states: Tensor, groups: Groups, choices: int) -> Tensor:
    """Gather every slot's token in the order of experts: (T, H) → (T · choices, H).

    Equal to ``states[groups.order // choices]``, without the scattered addition that indexing has
    as its gradient.
    """
    return _gather(states, groups.order, groups.inverse, choices)


def combine(rows: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """Sum the weighted rows of every token's slots.

    Parameters
    ----------
    rows : Tensor, shape (T · choices, H)
        In the order of experts.
    groups : Groups
        That order.
    weights : Tensor, shape (T, choices)
        Weight of every slot.

    Returns
    -------
    Tensor, shape (T, H)
    """
    return weighted_sums(_gather(rows, groups.inverse, groups.order), weights)


def weighted_sums(slots: Tensor, weights: Tensor) -> Tensor:
    """Sum the weighted rows of every token: (T · choices, H), (T, choices) → (T, H)."""
    dtype = torch.promote_types(slots.dtype, weights.dtype)
    slots, weights = cast(slots, dtype), cast(weights, dtype)
    tokens, choices = weights.shape
    if choices == 1:
        return slots * weights
    # A product reads every row once, and no weighted rows are written.
    return torch.bmm(weights[:, None], slots.view(tokens, choices, slots.shape[1])).squeeze(1)


def add_to_slots(tokens: Tensor, slots: Tensor) -> Tensor:
    """Add rows of tokens, (T, n), or of slots, (N, n), to rows of slots that lie token by token."""
    if tokens.shape == slots.shape:
        return tokens + slots
    by_token = slots.view(tokens.shape[0], -1, slots.shape[1])
    return (tokens[:, None] + by_token).flatten(0, 1)


def zero_unrouted(rows: Tensor, unrouted: Tensor | None) -> Tensor:
    """Set rows (N, …), and their gradients, to zero where ``unrouted`` (N,) is true.

    A product with 0 would let NaN and infinity through.
    """
    if unrouted is None:
        return rows
    return rows.masked_fill(unrouted.view(-1, *[1] * (rows.ndim - 1)), 0)


def _gather(rows: Tensor, order: Tensor, inverse: Tensor, choices: int = 1) -> Tensor:
    """Return ``rows[order // choices]``; the gradient gathers along ``inverse``."""
    if torch.is_grad_enabled() and not needs_native_operators():
        return _Gather.apply(rows, order, inverse, choices)
    return _select_tokens(rows, order, choices)


def _select_tokens(rows: Tensor, order: Tensor, choices: int) -> Tensor:
    return rows.index_select(0, order // choices if choices > 1 else order)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, inverse, choices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        ctx.choices = choices
        return _select_tokens(rows, order, choices)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _GatherAdjoint.apply(grad, *ctx.saved_tensors, ctx.choices), None, None, None


class _GatherAdjoint(torch.autograd.Function):
    """The adjoint of :class:`_Gather`: sums over the slots of every token."""

    @staticmethod
    def forward(ctx, rows, order, inverse, choices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        ctx.choices = choices
        slots = rows.index_select(0, inverse)
        return slots.view(-1, choices, rows.shape[1]).sum(1) if choices > 1 else slots

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Gather.apply(grad, *ctx.saved_tensors, ctx.choices), None, None, None
