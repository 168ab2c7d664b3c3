"""Rows that ranks send to each other: every token goes to the ranks of its experts, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Exchange:
    """Which rows this rank sends to the ranks of a group, and how many it receives from each.

    A token goes once to every rank that has one of its experts.

    Attributes
    ----------
    group : ProcessGroup
    tokens : Tensor of int64, shape (N,)
        The token of every row that is sent, rank by rank.
    choices : Tensor of int64, shape (N, k)
        The choices of these tokens, as numbers of the receiving rank's experts; its number of
        experts marks choices of other ranks, and those without an expert.
    sent, received : list of int
        Rows to and from every rank.
    """

    group: ProcessGroup
    tokens: Tensor
    choices: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, index: Tensor, per_rank: int, group: ProcessGroup) -> Exchange:
        """Agree with all ranks of a group on the rows of a call.

        Parameters
        ----------
        index : Tensor of int64, shape (T, k)
            Experts of this rank's tokens, as numbers of the whole layer. The layer's number of
            experts marks a choice without an expert.
        per_rank : int
            Experts of every rank.
        group : ProcessGroup
        """
        ranks = torch.arange(group.size(), device=index.device)
        goes = (index[..., None].div(per_rank, rounding_mode="floor") == ranks).any(1)
        rank, tokens = goes.mT.nonzero(as_tuple=True)
        choices = index[tokens] - rank[:, None] * per_rank
        choices = choices.where((choices >= 0) & (choices < per_rank), per_rank)
        sent = goes.sum(0)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        return cls(group, tokens, choices, sent.tolist(), received.tolist())

    def send(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Send rows of tokens to the ranks, and return those that arrive: (N, …) → (M, …)."""
        return _AllToAll.apply(self.group, self.sent, self.received, *rows)

    def send_back(self, rows: Tensor) -> Tensor:
        """Return what the ranks computed of this rank's rows: (M, …) → (N, …)."""
        (found,) = _AllToAll.apply(self.group, self.received, self.sent, rows)
        return found


class _AllToAll(torch.autograd.Function):
    """Exchange the rows of several tensors, always in this order: ranks must not differ in it."""

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, sent: list[int], received: list[int], *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.route = group, received, sent
        found = []
        for each in rows:
            arriving = each.new_empty(sum(received), *each.shape[1:])
            distributed.all_to_all_single(arriving, each.contiguous(), received, sent, group=group)
            found.append(arriving)
        ctx.mark_non_differentiable(*(each for each in found if not each.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Every rank takes part, also one whose rows had no influence: torch gives zeros for them.
        # It gives zeros for integers as well, which nobody needs.
        back = iter(_AllToAll.apply(*ctx.route, *filter(Tensor.is_floating_point, gradients)))
        of_rows = (next(back) if each.is_floating_point() else None for each in gradients)
        return None, None, None, *of_rows
