"""Slots in chunks of one expert's rows, which stay in a CPU's caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnmoe.nn.compute.choices import SortedChoices
from tnmoe.nn.compute.half_precision import sum_dtype
from tnmoe.nn.compute.once_per_token import Tensors, is_owned
from tnmoe.nn.compute.slot_network import SlotFunction, SlotNetwork, sum_at_once
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.transforms import autocast_as, autocast_state

# Numbers in the widest rows of a chunk, which should stay in a CPU's last-level cache from one
# operation to the next. Smaller chunks leave threads too little work, larger ones take more memory.
_CHUNK = 1 << 20

# Numbers that each array of the network may hold for the backward pass. Beyond that, the backward
# pass computes the chunks again.
_KEPT = 1 << 24


def sum_in_chunks(
    network: SlotNetwork, groups: Groups, weights: Tensor, step: int | None = None
) -> list[Tensor]:
    """Compute :func:`sum_at_once` in chunks of one expert's rows, which stay in a CPU's cache.

    No array has a row for every slot, except those that the backward pass needs. Where these would
    be large, the backward pass computes every chunk again instead. At least one slot must have an
    expert. A network that calls projections must need no gradients.

    Parameters
    ----------
    network, groups, weights
        As for :func:`sum_at_once`.
    step : int, optional
        Rows of a chunk; by default, as many as stay in a cache.
    """
    step = step or max(16, _CHUNK // network.width)
    is_kept = groups.layer_slots * network.width <= _KEPT
    own = network.function, network.num_experts, network.has_calls
    chunks = _Chunks(*own, groups, weights.shape[1], step, is_kept)
    tensors = (*network.inputs, *network.weights)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (weights, *tensors)):
        return list(_SumInChunks.apply(chunks, len(network.inputs), weights, *tensors))
    compute = partial(chunks.result, network.inputs, network.weights)
    return chunks.sums(compute, weights)


@dataclass(frozen=True)
class _Result:
    """The leaves of a chunk, i.e. its rows and its expert's weights, and its outputs."""

    leaves: list[Tensor]
    outputs: Tensors


class _Chunk(NamedTuple):
    """Rows of one expert: the number of the first one, their slots and their tokens."""

    expert: int
    start: int
    slots: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _Chunks:
    """Chunks of the slots of a call, each with rows of one expert alone.

    ``is_kept`` says whether the backward pass takes the chunks of the forward pass, or computes
    them again.
    """

    function: SlotFunction
    num_experts: int
    has_calls: bool
    groups: Groups
    choices: int
    step: int
    is_kept: bool

    def __iter__(self) -> Iterator[_Chunk]:
        for expert, block in self.groups.blocks:
            for start in range(block.start, block.stop, self.step):
                slots = self.groups.order[start : min(start + self.step, block.stop)]
                yield _Chunk(expert, start, slots, slots // self.choices)

    def own(self, expert: int, weights: Tensors) -> list[Tensor]:
        """Return an expert's weights, as those of a network with this expert alone."""
        if self.has_calls:
            return list(weights)
        return [
            weight[expert : expert + 1] if is_owned(weight, self.num_experts) else weight
            for weight in weights
        ]

    def order(self, chunk: _Chunk) -> Groups:
        """Return the groups of a chunk's rows."""
        rows = len(chunk.slots)
        if self.has_calls:
            return self.groups.part(chunk.start, chunk.start + rows)
        return Groups.of_one_expert(rows, chunk.slots.device)

    def result(
        self,
        inputs: Tensors,
        weights: Tensors,
        chunk: _Chunk,
        needs: Sequence[bool] | None = None,
    ) -> _Result:
        """Compute a chunk.

        ``needs`` says which inputs and weights have gradients; by default none is recorded.
        """
        leaves = [states.index_select(0, chunk.tokens) for states in inputs]
        leaves += self.own(chunk.expert, weights)
        if needs is not None:
            pairs = zip(leaves, needs, strict=True)
            leaves = [leaf.detach().requires_grad_(need) for leaf, need in pairs]
        count = len(inputs)
        with torch.set_grad_enabled(needs is not None):
            outputs = self.function(leaves[:count], leaves[count:], self.order(chunk))
        return _Result(leaves, outputs)

    def sums(self, compute: Callable[[_Chunk], _Result], factors: Tensor) -> list[Tensor]:
        """Sum the outputs of all chunks for every token, weighted by factors, (T, k).

        The method frees a chunk before it computes the next one: few arrays stay in a cache.
        """
        flat, sums = factors.reshape(-1, 1), list[Tensor]()
        for chunk in self:
            _add_outputs(
                compute(chunk).outputs, chunk.tokens, flat[chunk.slots], sums, len(factors)
            )
        return sums

    def gradients(
        self,
        compute: Callable[[_Chunk], _Result],
        given: Tensors,
        count: int,
        factors: Tensor,
        grads: Tensors,
    ) -> list[Tensor]:
        """Return the gradients of what was given, and of the factors.

        Zeros stand for the gradients of what needs none. As in :meth:`sums`, there is one chunk at
        a time.

        Parameters
        ----------
        compute : callable
            Returns the result of a chunk, with the operations that led to it.
        given : sequence of Tensor
            The inputs, ``count`` of them, and the weights.
        count : int
        factors : Tensor, shape (T, k)
        grads : sequence of Tensor
            Gradients of the sums.
        """
        flat = factors.reshape(-1, 1)
        *totals, of_factors = [
            _zeros(each, len(each), sum_dtype(each.dtype)) for each in (*given, flat)
        ]
        for chunk in self:
            of_inputs, of_weights = totals[:count], self.own(chunk.expert, totals[count:])
            of_chunk = _add_gradients(
                compute(chunk), chunk.tokens, flat[chunk.slots], grads, of_inputs, of_weights
            )
            of_factors[chunk.slots] = of_chunk.to(of_factors.dtype)
        return [*totals, of_factors]


def _add_outputs(
    outputs: Tensors, tokens: Tensor, factors: Tensor, sums: list[Tensor], count: int
) -> None:
    """Add a chunk's weighted outputs to the sums of ``count`` tokens, which the first chunk makes.

    Parameters
    ----------
    outputs : sequence of Tensor
        n rows each.
    tokens : Tensor of int64, shape (n,)
        Token of every row.
    factors : Tensor, shape (n, 1)
    sums : list of Tensor
    count : int
    """
    dtype = sum_dtype(torch.promote_types(outputs[0].dtype, factors.dtype))
    if not sums:
        sums += [_zeros(output, count, dtype) for output in outputs]
    for total, output in zip(sums, outputs, strict=True):
        total.index_add_(0, tokens, output.detach().to(dtype) * factors)


def _add_gradients(
    result: _Result,
    tokens: Tensor,
    factors: Tensor,
    grads: Tensors,
    of_inputs: Sequence[Tensor],
    of_weights: Sequence[Tensor],
) -> Tensor:
    """Add a chunk's gradients to those of inputs and of weights; return those of its factors.

    Parameters
    ----------
    result : _Result
        n rows.
    tokens : Tensor of int64, shape (n,)
        Token of every row.
    factors : Tensor, shape (n, 1)
    grads : sequence of Tensor
        Gradients of the sums over the slots of every token.
    of_inputs, of_weights : sequence of Tensor
    """
    of_rows = [grad.index_select(0, tokens) for grad in grads]
    pairs = list(zip(of_rows, result.outputs, strict=True))
    products = [(grad * output.detach()).sum(1, keepdim=True) for grad, output in pairs]
    weighted = [(output, grad.mul_(factors).to(output.dtype)) for grad, output in pairs]
    totals = [*of_inputs, *of_weights]
    for number, part in _gradients(weighted, result.leaves):
        if number < len(of_inputs):
            totals[number].index_add_(0, tokens, part.to(totals[number].dtype))
        else:
            totals[number] += part
    return torch.stack(products).sum(0)


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


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, count: int, factors: Tensor, *given: Tensor) -> Any:
        ctx.chunks, ctx.count = chunks, count
        ctx.autocast = autocast_state(factors.device)
        ctx.save_for_backward(factors, *given)
        inputs, weights, ctx.results = given[:count], given[count:], None
        if not chunks.is_kept:
            return tuple(chunks.sums(partial(chunks.result, inputs, weights), factors))
        needs = ctx.needs_input_grad[3:]
        ctx.results = {
            chunk.start: chunks.result(inputs, weights, chunk, needs) for chunk in chunks
        }
        return tuple(chunks.sums(lambda chunk: ctx.results[chunk.start], factors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factors, *given = ctx.saved_tensors
        inputs, weights = given[: ctx.count], given[ctx.count :]
        needs, chunks = ctx.needs_input_grad[3:], ctx.chunks
        with autocast_as(ctx.autocast):
            if torch.is_grad_enabled():  # with create_graph=True
                return None, None, *_differentiable(chunks, factors, inputs, weights, grads)
            # The first backward pass frees what was kept; another one computes it again.
            kept, ctx.results = ctx.results, None

            def compute(chunk: _Chunk) -> _Result:
                if kept is None:
                    return chunks.result(inputs, weights, chunk, needs)
                return kept.pop(chunk.start)

            *found, of_factors = chunks.gradients(compute, given, ctx.count, factors, grads)
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
    count, groups = 1 + len(inputs), chunks.groups
    network = SlotNetwork(views[1:count], views[count:], chunks.function, chunks.num_experts)
    slots = SortedChoices(groups, int(groups.offsets[-1]), None)
    sums = sum_at_once(network, slots, views[0])
    found = dict(_gradients(list(zip(sums, grads, strict=True)), views, create_graph=True))
    return [found.get(number) for number in range(len(views))]
