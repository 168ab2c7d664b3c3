"""The network that slots go through between the parts of a layer that act once per token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.nn.compute.choices import Choices, SortedChoices
from tnmoe.nn.compute.once_per_token import Tensors
from tnmoe.nn.compute.slots import (
    Groups,
    SlotOrder,
    UnsortedSlots,
    combine,
    dispatch,
    weighted_sums,
    zero_unrouted,
)

# A function of rows of all inputs, of weights, and of the order of the slots. Slots that are not
# sorted lie token by token. For them, the function takes one row per token.
SlotFunction = Callable[[Tensors, Tensors, SlotOrder], Tensors]


@dataclass(frozen=True)
class SlotNetwork:
    """What slots compute: rows of every input → rows of every sum.

    Attributes
    ----------
    inputs : sequence of Tensor
        T rows each: what the first products made of the tokens.
    weights : sequence of Tensor
        What ``function`` multiplies by; see :func:`tnmoe.nn.compute.once_per_token.is_owned`.
    function : callable
        Takes rows of all inputs, weights, and the order of the slots. Returns tensors with one row
        per slot. The last product takes the weighted sums of these over the slots of every token.
    num_experts : int
        Number of experts E.
    width : int
        Entries of the widest rows.
    most_rows : int
        Rows that may go through together without a backward pass.
    has_calls : bool
        Whether ``function`` multiplies by more than ``weights``: it calls projections.
    """

    inputs: Tensors
    weights: Tensors
    function: SlotFunction
    num_experts: int
    width: int = 0
    most_rows: int = sys.maxsize
    has_calls: bool = False


def sum_at_once(
    network: SlotNetwork, slots: SortedChoices, weights: Tensor, step: int | None = None
) -> list[Tensor]:
    """Take all slots through a network together, and sum its weighted rows for every token.

    Parameters
    ----------
    network : SlotNetwork
    slots : SortedChoices
    weights : Tensor, shape (T, k)
        Weights of the slots.
    step : int, optional
        Rows that go through together; all by default.

    Returns
    -------
    list of Tensor
        T rows each.
    """
    groups, routed, unrouted = slots.groups, slots.routed, slots.unrouted
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


def sum_unsorted(network: SlotNetwork, choices: Choices) -> list[Tensor]:
    """Compute :func:`sum_at_once` for a few slots without sorting them; without gradients.

    Parameters
    ----------
    network : SlotNetwork
    choices : Choices
    """
    slots = UnsortedSlots(choices.known_index().reshape(-1))
    outputs = network.function(network.inputs, network.weights, slots)
    unrouted = None if choices.unrouted is None else choices.unrouted.reshape(-1)
    return [weighted_sums(zero_unrouted(each, unrouted), choices.weights) for each in outputs]


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
