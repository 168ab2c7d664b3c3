"""The experts that the tokens of a call chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.nn.compute.slots import Groups, zero_unrouted

# Indices up to this number are read as a list, more of them by a reduction.
_FEW_INDICES = 128


@dataclass(frozen=True)
class Choices:
    """The experts that tokens chose, and the weights of these experts.

    Attributes
    ----------
    index : Tensor of int64, shape (T, k)
        Experts of every token; index E marks a choice without an expert.
    weights : Tensor, shape (T, k)
        Weights of the experts' outputs; 0 where there is no expert.
    unrouted : Tensor of bool, shape (T, k), or None
        Choices without an expert; None if it is known that there are none.
    num_experts : int
        Number of experts E.
    is_readable : bool
        Whether code may read the numbers in a tensor. If not, indices are not checked, and any
        from E on marks a choice without an expert.
    """

    index: Tensor
    weights: Tensor
    unrouted: Tensor | None
    num_experts: int
    is_readable: bool

    @classmethod
    def of(cls, index: Tensor, weights: Tensor, num_experts: int, is_readable: bool) -> Choices:
        """Look for choices without an expert, whose weights do not count.

        Parameters
        ----------
        index, weights, num_experts, is_readable
            As for the class.

        Raises
        ------
        InputError
            If an index is readable and not in 0, …, E.
        """
        if is_readable and _highest(index, num_experts) < num_experts:
            return cls(index, weights, None, num_experts, is_readable)
        unrouted = index >= num_experts
        weights = weights.masked_fill(unrouted, 0)
        return cls(index, weights, unrouted, num_experts, is_readable)

    @property
    def slots(self) -> int:
        """Number of slots N = T · k."""
        return self.index.numel()

    def zero_unrouted(self, states: Tensor) -> Tensor:
        """Set states, (T, H), and their gradients, to zero for tokens without any expert."""
        return states if self.unrouted is None else zero_unrouted(states, self.unrouted.all(1))

    def known_index(self) -> Tensor:
        """Return the index with expert 0 for choices without an expert."""
        return self.index if self.unrouted is None else self.index.masked_fill(self.unrouted, 0)

    def sort(self) -> SortedChoices:
        """Sort the slots by expert.

        Where numbers may not be read, an expert that has tokens anyway takes the slots without an
        expert. Their outputs must be dropped.
        """
        flat = self.index.reshape(-1)
        if self.unrouted is None:
            return SortedChoices(Groups.of(flat, self.num_experts), len(flat), None)
        if self.is_readable:
            groups = Groups.of(flat, self.num_experts)
            return SortedChoices(groups, int(groups.offsets[-1]), None)
        used = F.pad(self.known_index().reshape(-1), (0, 1)).amax()
        flat = torch.where(self.unrouted, used, self.index).reshape(-1)
        groups = Groups.of(flat, self.num_experts)
        unrouted = self.unrouted.reshape(-1).index_select(0, groups.order)
        return SortedChoices(groups, groups.layer_slots, unrouted)


@dataclass(frozen=True)
class SortedChoices:
    """The slots of a call in the order of experts.

    Attributes
    ----------
    groups : Groups
    routed : int
        Rows after the first ``routed`` ones have no expert.
    unrouted : Tensor of bool, shape (N,), or None
        Rows that have no expert, where their number may not be read.
    """

    groups: Groups
    routed: int
    unrouted: Tensor | None


def _highest(index: Tensor, num_experts: int) -> int:
    """Return the highest index, or −1 if there is none; check that all are in 0, …, E."""
    if not index.numel():
        return -1
    if index.numel() <= _FEW_INDICES:
        numbers = index.reshape(-1).tolist()
        lowest, highest = min(numbers), max(numbers)
    else:
        lowest, highest = (int(each) for each in torch.aminmax(index))
    if lowest < 0 or highest > num_experts:
        raise InputError(
            f"top_k_index must hold experts from 0 to {num_experts - 1}, or {num_experts} for "
            f"none, got {lowest} to {highest}"
        )
    return highest
