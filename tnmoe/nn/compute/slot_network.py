"""The network that slots go through between the parts of a layer that act once per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.nn.compute.half_precision import sum_dtype
from tnmoe.nn.compute.once_per_token import Tensors, is_owned
from tnmoe.nn.compute.slots import Groups, combine, dispatch, zero_unrouted
from tnmoe.nn.transforms import autocast_as, autocast_state

# Numbers in the widest rows of a chunk, which should stay in a CPU's cache from one operation to
# the next.
_CHUNK = 1 << 19


# A function of rows of all inputs, of weights, and of the groups of the rows.
SlotFunction = Callable[[Tensors, Tensors, Groups], Tensors]


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
        Takes rows of all inputs, weights, and the groups of the rows. Returns tensors with as many
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

    The backward pass computes every chunk again, so no array has a row for every slot. At least one
    slot must have an expert.

    Parameters
    ----------
    network, groups, weights
        As for :func:`sum_at_once`.
    width : int
        Entries of the widest rows in the network.
    """
    chunks = _Chunks(
        network.function, network.num_experts, groups, weights.shape[1], max(16, _CHUNK // width)
    )
    if not torch.is_grad_enabled():
        return chunks.forward(network.inputs, network.weights, weights)
    tensors = (*network.inputs, *network.weights)
    return list(_SumInChunks.apply(chunks, len(network.inputs), weights, *tensors))


@dataclass(frozen=True)
class _Chunks:
    """Chunks of the slots of a call, each with rows of one expert alone."""

    function: SlotFunction
    num_experts: int
    groups: Groups
    choices: int
    step: int

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the expert, the slots and the tokens of every chunk."""
        for expert, block in self.groups.blocks:
            for slots in self.groups.order[block].split(self.step):
                yield expert, slots, slots // self.choices

    def own(self, expert: int, weight: Tensor) -> Tensor:
        """Return an expert's part of a weight, as in a network with this expert alone."""
        return weight[expert : expert + 1] if is_owned(weight, self.num_experts) else weight

    def outputs(self, rows: Tensors, own: Tensors, factor: Tensor) -> list[Tensor]:
        """Return the outputs of a chunk times the weights of its slots, (n, 1)."""
        group = Groups.of_one_expert(len(factor), factor.device)
        return [output * factor for output in self.function(rows, own, group)]

    def forward(self, inputs: Tensors, weights: Tensors, factors: Tensor) -> list[Tensor]:
        """Sum the weighted outputs of all chunks for every token."""
        flat, sums = factors.reshape(-1, 1), list[Tensor]()
        for expert, slots, tokens in self:
            rows = [states.index_select(0, tokens) for states in inputs]
            own = [self.own(expert, weight) for weight in weights]
            outputs = self.outputs(rows, own, flat.index_select(0, slots))
            sums = sums or [_zeros(len(factors), output) for output in outputs]
            for total, output in zip(sums, outputs, strict=True):
                total.index_add_(0, tokens, output.to(total.dtype))
        return sums

    def backward(
        self, tensors: Tensors, count: int, grads: Tensors, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients that are needed, and None elsewhere; compute every chunk again.

        ``tensors`` are the factors, ``count`` inputs, and the weights.
        """
        factors, inputs, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        flat = factors.reshape(-1, 1)
        totals = [
            _zeros(len(tensor), tensor) if need else None
            for tensor, need in zip((flat, *inputs, *weights), needed, strict=True)
        ]
        for expert, slots, tokens in self:
            rows = (states.index_select(0, tokens) for states in inputs)
            own = (self.own(expert, weight) for weight in weights)
            leaves = [
                part.detach().requires_grad_(need)
                for part, need in zip((flat[slots], *rows, *own), needed, strict=True)
            ]
            with torch.enable_grad():
                outputs = self.outputs(leaves[1 : 1 + count], leaves[1 + count :], leaves[0])
            found = _gradients(outputs, leaves, [grad.index_select(0, tokens) for grad in grads])
            places = [slots, *[tokens] * count, *[None] * len(weights)]
            for total, part, place in zip(totals, found, places, strict=True):
                if total is None or part is None:
                    continue
                if place is None:
                    self.own(expert, total).add_(part)
                else:
                    total.index_add_(0, place, part.to(total.dtype))
        if totals[0] is not None:
            totals[0] = totals[0].view_as(factors)
        return totals


def _gradients(
    outputs: Tensors, leaves: Tensors, grads: Tensors, create_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradients of the leaves that require one, and None for the others."""
    reached = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad
    ]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    if not (needed and reached):
        return [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in reached],
            needed,
            [grad for _, grad in reached],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _zeros(rows: int, like: Tensor) -> Tensor:
    """Return zeros for sums of tensors like this one."""
    return like.new_zeros(rows, *like.shape[1:], dtype=sum_dtype(like.dtype))


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, count: int, factors: Tensor, *tensors: Tensor) -> Any:
        ctx.chunks, ctx.count = chunks, count
        ctx.autocast = autocast_state(factors.device)
        ctx.save_for_backward(factors, *tensors)
        return tuple(chunks.forward(tensors[:count], tensors[count:], factors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors, count = ctx.saved_tensors, ctx.count
        with autocast_as(ctx.autocast):
            if torch.is_grad_enabled():  # with create_graph=True
                return None, None, *_differentiable(ctx.chunks, tensors, count, grads)
            found = ctx.chunks.backward(tensors, count, grads, ctx.needs_input_grad[2:])
        gradients = (
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(found, tensors, strict=True)
        )
        return None, None, *gradients


def _differentiable(
    chunks: _Chunks, tensors: Tensors, count: int, grads: Tensors
) -> list[Tensor | None]:
    """Return gradients that have gradients themselves, from a network without chunks."""
    # One input may be a function of another: of a view of it, no other view is.
    views = [tensor.view_as(tensor) for tensor in tensors]
    factors, inputs, weights = views[0], views[1 : 1 + count], views[1 + count :]
    network = SlotNetwork(inputs, weights, chunks.function, chunks.num_experts)
    sums = sum_at_once(network, chunks.groups, factors, int(chunks.groups.offsets[-1]))
    return _gradients(sums, views, grads, create_graph=True)
