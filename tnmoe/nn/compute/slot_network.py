"""The network that slots go through between the parts of a layer that act once per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.nn.compute.half_precision import sum_dtype
from tnmoe.nn.compute.once_per_token import Tensors, is_owned
from tnmoe.nn.compute.slots import (
    Groups,
    SlotOrder,
    UnsortedSlots,
    combine,
    dispatch,
    zero_unrouted,
)
from tnmoe.nn.transforms import autocast_as, autocast_state

# Numbers in the widest rows of a chunk, which should stay in a CPU's cache from one operation to
# the next.
_CHUNK = 1 << 19

# Numbers that each array of the network may hold for the backward pass. Beyond that, the backward
# pass computes the chunks again.
_KEPT = 1 << 24


# A function of rows of all inputs, of weights, and of the groups of the rows.
SlotFunction = Callable[[Tensors, Tensors, SlotOrder], Tensors]


@dataclass(frozen=True)
class SlotNetwork:
    """What slots compute: rows of every input → rows of every sum.

    Attributes
    ----------
    inputs : sequence of Tensor
        T rows each: what the first products made of the tokens.
    weights : sequence of Tensor
        What ``function`` multiplies by; see :func:`is_owned`.
    function : callable
        Takes rows of all inputs, weights, and the order of the rows. Returns tensors with as many
        rows, whose weighted sums over the slots of every token are the last product's.
    num_experts : int
        Number of experts E.
    """

    inputs: Tensors
    weights: Tensors
    function: SlotFunction
    num_experts: int


def sum_at_once(
    network: SlotNetwork,
    groups: Groups,
    weights: Tensor,
    routed: int,
    unrouted: Tensor | None = None,
    step: int | None = None,
) -> list[Tensor]:
    """Take all slots through a network together, and sum its weighted rows for every token.

    Parameters
    ----------
    network : SlotNetwork
    groups : Groups
        Of all slots.
    weights : Tensor, shape (T, k)
        Weights of the slots.
    routed : int
        Rows after the first ``routed`` ones have no expert.
    unrouted : Tensor of bool, shape (N,), optional
        Rows that have no expert, where their number is not known.
    step : int, optional
        Rows that go through together; all by default.

    Returns
    -------
    list of Tensor
        T rows each.
    """
    rows = [dispatch(states, groups, weights.shape[1]) for states in network.inputs]
    if routed < groups.layer_slots:
        missing = groups.layer_slots - routed
        outputs = _in_pieces(network, [part[:routed] for part in rows], groups.head(routed), step)
        outputs = [F.pad(output, (0, 0, 0, missing)) for output in outputs]
    else:
        rows = [zero_unrouted(part, unrouted) for part in rows]
        outputs = _in_pieces(network, rows, groups, step)
        outputs = [zero_unrouted(output, unrouted) for output in outputs]
    return [combine(output, groups, weights) for output in outputs]


def sum_unsorted(
    network: SlotNetwork, index: Tensor, weights: Tensor, unrouted: Tensor | None = None
) -> list[Tensor]:
    """Compute :func:`sum_at_once` for a few slots without sorting them; without gradients.

    Parameters
    ----------
    network : SlotNetwork
    index : Tensor of int64, shape (T, k)
        Experts of every token, from 0 to E − 1; any number of these for slots without an expert.
    weights : Tensor, shape (T, k)
        Weights of the slots.
    unrouted : Tensor of bool, shape (N,), optional
        Slots that have no expert.
    """
    tokens, choices = index.shape
    slots = UnsortedSlots(index.reshape(-1), tokens * choices)
    rows = [
        states[:, None].expand(-1, choices, -1).reshape(tokens * choices, -1)
        for states in network.inputs
    ]
    rows = [zero_unrouted(part, unrouted) for part in rows]
    outputs = network.function(rows, network.weights, slots)
    outputs = [zero_unrouted(output, unrouted) for output in outputs]
    dtype = torch.promote_types(outputs[0].dtype, weights.dtype)
    factors = weights[:, None].to(dtype)
    return [
        torch.bmm(factors, output.view(tokens, choices, -1).to(dtype))[:, 0] for output in outputs
    ]


def _in_pieces(
    network: SlotNetwork, rows: Sequence[Tensor], groups: Groups, step: int | None
) -> Tensors:
    count = len(groups.experts)
    if step is None or count <= step:
        return network.function(rows, network.weights, groups)
    pieces = [
        network.function(
            [part[start : start + step] for part in rows],
            network.weights,
            groups.part(start, min(start + step, count)),
        )
        for start in range(0, count, step)
    ]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def sum_in_chunks(
    network: SlotNetwork, groups: Groups, weights: Tensor, width: int
) -> list[Tensor]:
    """Compute :func:`sum_at_once` in chunks of one expert's rows, which stay in a CPU's cache.

    No array has a row for every slot, except those that the backward pass needs. Where these would
    be large, the backward pass computes every chunk again instead. At least one slot must have an
    expert.

    Parameters
    ----------
    network, groups, weights
        As for :func:`sum_at_once`.
    width : int
        Entries of the widest rows in the network.
    """
    step, is_kept = max(16, _CHUNK // width), groups.layer_slots * width <= _KEPT
    chunks = _Chunks(network.function, network.num_experts, groups, weights.shape[1], step, is_kept)
    tensors = (*network.inputs, *network.weights)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (weights, *tensors)):
        return list(_SumInChunks.apply(chunks, len(network.inputs), weights, *tensors))
    results = chunks.results(network.inputs, network.weights)
    return chunks.sums(results, weights)


@dataclass(frozen=True)
class _Result:
    """The leaves of a chunk, i.e. its rows and its expert's weights, and its outputs."""

    leaves: list[Tensor]
    outputs: Tensors


@dataclass(frozen=True)
class _Chunks:
    """Chunks of the slots of a call, each with rows of one expert alone.

    ``is_kept`` says whether the backward pass takes the chunks of the forward pass, or computes
    them again.
    """

    function: SlotFunction
    num_experts: int
    groups: Groups
    choices: int
    step: int
    is_kept: bool

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the expert, the slots and the tokens of every chunk."""
        for expert, block in self.groups.blocks:
            for slots in self.groups.order[block].split(self.step):
                yield expert, slots, slots // self.choices

    def own(self, expert: int, weights: Tensors) -> list[Tensor]:
        """Return an expert's weights, as those of a network with this expert alone."""
        return [
            weight[expert : expert + 1] if is_owned(weight, self.num_experts) else weight
            for weight in weights
        ]

    def results(
        self, inputs: Tensors, weights: Tensors, needs: Sequence[bool] | None = None
    ) -> Iterator[_Result]:
        """Compute all chunks, one after the other.

        ``needs`` says which inputs and weights have gradients; by default none is recorded.
        """
        for expert, slots, tokens in self:
            rows = [states.index_select(0, tokens) for states in inputs]
            leaves = [*rows, *self.own(expert, weights)]
            if needs is not None:
                pairs = zip(leaves, needs, strict=True)
                leaves = [leaf.detach().requires_grad_(need) for leaf, need in pairs]
            group = Groups.of_one_expert(len(slots), slots.device)
            with torch.set_grad_enabled(needs is not None):
                outputs = self.function(leaves[: len(rows)], leaves[len(rows) :], group)
            yield _Result(leaves, outputs)

    def sums(self, results: Iterable[_Result], factors: Tensor) -> list[Tensor]:
        """Sum the outputs of all chunks for every token, weighted by factors, (T, k)."""
        flat, sums = factors.reshape(-1, 1), list[Tensor]()
        for (_, slots, tokens), result in zip(self, results, strict=True):
            outputs, factor = [output.detach() for output in result.outputs], flat[slots]
            dtype = sum_dtype(torch.promote_types(outputs[0].dtype, factor.dtype))
            sums = sums or [_zeros(output, len(factors), dtype) for output in outputs]
            for total, output in zip(sums, outputs, strict=True):
                total.index_add_(0, tokens, output.to(dtype) * factor)
        return sums

    def gradients(
        self,
        results: Iterable[_Result],
        given: Tensors,
        count: int,
        factors: Tensor,
        grads: Tensors,
    ) -> list[Tensor]:
        """Return the gradients of what was given, and of the factors.

        Zeros stand for the gradients of what needs none.

        Parameters
        ----------
        results : iterable of _Result
            Of all chunks.
        given : sequence of Tensor
            The inputs, ``count`` of them, and the weights.
        count : int
        factors : Tensor, shape (T, k)
        grads : sequence of Tensor
            Gradients of the sums.
        """
        flat = factors.reshape(-1, 1)
        totals = [_zeros(each, len(each), sum_dtype(each.dtype)) for each in (*given, flat)]
        for (expert, slots, tokens), result in zip(self, results, strict=True):
            of_outputs = [grad.index_select(0, tokens) for grad in grads]
            pairs = list(zip(of_outputs, result.outputs, strict=True))
            products = (_row_products(grad, output.detach()) for grad, output in pairs)
            totals[-1][slots] = sum(part.to(totals[-1].dtype) for part in products)
            factor = flat[slots]
            weighted = [(output, grad.mul_(factor).to(output.dtype)) for grad, output in pairs]
            own = [*totals[:count], *self.own(expert, totals[count:-1])]
            for number, part in _gradients(weighted, result.leaves):
                if number < count:
                    own[number].index_add_(0, tokens, part.to(own[number].dtype))
                else:
                    own[number] += part
        return totals


def _zeros(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(rows, *like.shape[1:], dtype=dtype)


def _gradients(
    outputs: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor], create_graph: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers of leaves that have gradients, and these gradients.

    Parameters
    ----------
    outputs : sequence of (Tensor, Tensor)
        Every output with its own gradient.
    leaves : sequence of Tensor
    create_graph : bool
        Whether the gradients shall have gradients themselves.
    """
    numbers = [number for number, leaf in enumerate(leaves) if leaf.requires_grad]
    pairs = [pair for pair in outputs if pair[0].requires_grad]
    if not pairs:
        return
    differentiable, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        differentiable,
        [leaves[number] for number in numbers],
        grads,
        allow_unused=True,
        create_graph=create_graph,
    )
    for number, grad in zip(numbers, found, strict=True):
        if grad is not None:
            yield number, grad


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the scalar product of every two rows: (n, m), (n, m) → (n, 1)."""
    return torch.bmm(left[:, None], right.to(left.dtype)[..., None])[:, 0]


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, count: int, factors: Tensor, *given: Tensor) -> Any:
        ctx.chunks, ctx.count = chunks, count
        ctx.autocast = autocast_state(factors.device)
        ctx.save_for_backward(factors, *given)
        inputs, weights, ctx.results = given[:count], given[count:], None
        if not chunks.is_kept:
            return tuple(chunks.sums(chunks.results(inputs, weights), factors))
        ctx.results = list(chunks.results(inputs, weights, ctx.needs_input_grad[3:]))
        return tuple(chunks.sums(ctx.results, factors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factors, *given = ctx.saved_tensors
        inputs, weights = given[: ctx.count], given[ctx.count :]
        needs, chunks = ctx.needs_input_grad[3:], ctx.chunks
        with autocast_as(ctx.autocast):
            if torch.is_grad_enabled():  # with create_graph=True
                return None, None, *_differentiable(chunks, factors, inputs, weights, grads)
            # The first backward pass frees what was kept; another one computes it again.
            results, ctx.results = ctx.results or chunks.results(inputs, weights, needs), None
            *found, of_factors = chunks.gradients(results, given, ctx.count, factors, grads)
        gradients = [
            grad.to(tensor.dtype) if need else None
            for grad, tensor, need in zip(found, given, needs, strict=True)
        ]
        return None, None, of_factors.view_as(factors).to(factors.dtype), *gradients


def _differentiable(
    chunks: _Chunks, factors: Tensor, inputs: Tensors, weights: Tensors, grads: Tensors
) -> list[Tensor | None]:
    """Return gradients that have gradients themselves, from a network without chunks."""
    # One input may be a function of another one, but no view is a function of another view.
    views = [tensor.view_as(tensor) for tensor in (factors, *inputs, *weights)]
    count = 1 + len(inputs)
    network = SlotNetwork(views[1:count], views[count:], chunks.function, chunks.num_experts)
    sums = sum_at_once(network, chunks.groups, views[0], int(chunks.groups.offsets[-1]))
    found = dict(_gradients(list(zip(sums, grads, strict=True)), views, create_graph=True))
    return [found.get(number) for number in range(len(views))]
