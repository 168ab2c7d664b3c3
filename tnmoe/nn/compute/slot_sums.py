"""The weighted sums over the slots of every token: which way they are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnmoe.nn.compute.choices import Choices
from tnmoe.nn.compute.once_per_token import is_owned
from tnmoe.nn.compute.slot_chunks import sum_in_chunks
from tnmoe.nn.compute.slot_network import SlotNetwork, sum_at_once, sum_unsorted
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.transforms import has_values, needs_native_operators

# Slots of a call that are multiplied by their experts' cores without being sorted: always up to the
# first number, and up to the second where the cores of all slots together have few numbers.
_FEWEST_SLOTS = 16
_FEW_SLOTS = 128
_FEW_NUMBERS = 1 << 19

# Numbers that the last-level cache of a CPU holds, roughly.
_LAST_LEVEL_CACHE = 1 << 22


def sum_slots(
    network: SlotNetwork,
    choices: Choices,
    is_repeatable: Callable[[], bool],
    may_take_turns: Callable[[int], bool],
) -> list[Tensor]:
    """Take the slots of a call through a network, and sum its weighted rows for every token.

    Few slots are not sorted. Many of them go through in chunks of one expert's rows on a CPU, and
    otherwise together.

    Parameters
    ----------
    network : SlotNetwork
    choices : Choices
    is_repeatable : callable
        Says whether the network gives the same again, as a backward pass in chunks needs.
    may_take_turns : callable
        Says, for a number of slots, whether calls of projections cost no more for one expert after
        the other than for all of them at once.

    Returns
    -------
    list of Tensor
        T rows each.
    """
    if _are_few(network, choices):
        return sum_unsorted(network, choices)
    slots, weights, training = choices.sort(), choices.weights, torch.is_grad_enabled()
    if slots.routed and _fill_caches(network, slots.groups):
        if not network.has_calls and (not training or is_repeatable()):
            return sum_in_chunks(network, slots.groups, weights)
        if network.has_calls and not training and may_take_turns(choices.slots):
            return sum_in_chunks(network, slots.groups, weights, network.most_rows)
    step = network.most_rows if choices.is_readable and not training else None
    return sum_at_once(network, slots, weights, step)


def _are_few(network: SlotNetwork, choices: Choices) -> bool:
    """Return whether slots are so few that sorting them costs more than it saves."""
    slots = choices.slots
    if torch.is_grad_enabled() or network.has_calls or not 0 < slots <= _FEW_SLOTS:
        return False
    if network.num_experts == 1:
        return False  # its cores look like shared ones, which act on tokens
    if slots <= _FEWEST_SLOTS:
        return True
    owned = (each for each in network.weights if is_owned(each, network.num_experts))
    largest = max([0, *(each[0].numel() for each in owned if each.ndim == 5)])
    return slots * largest <= _FEW_NUMBERS


def _fill_caches(network: SlotNetwork, groups: Groups) -> bool:
    """Return whether the rows of all slots at once would spill from the caches of a CPU."""
    return not (
        groups.layer_slots * network.width <= _LAST_LEVEL_CACHE
        or groups.offsets.device.type != "cpu"
        or torch.compiler.is_compiling()
        or needs_native_operators()
        or not has_values(groups.offsets)
    )
