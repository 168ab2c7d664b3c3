"""The load bias: added to the scores that choose experts, it balances their load without a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnmoe.nn.routing.counts import count_slots_per_expert
from tnmoe.nn.routing.ranks import sum_over_ranks
from tnmoe.nn.transforms import in_backward


class LoadBias(nn.Module):
    """A bias per expert, and the number of slots per expert since the bias last moved.

    Wang et al., arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Parameters
    ----------
    num_experts : int
        Number of experts E.
    device : device or str, optional
        Device of the bias.

    Attributes
    ----------
    value : Tensor of float32, shape (E,)
        A buffer, saved with the model. It stays in float32 when the model is cast: in half
        precision its small steps would be lost.
    counts : Tensor of int64, shape (E,)
        Slots of each expert. Not a buffer: it is not saved, and ``DistributedDataParallel`` does
        not replace it with the counts of another rank.

    Examples
    --------
    >>> bias = LoadBias(3)
    >>> bias.count(torch.tensor([[0], [0], [1]]), mask=None)  # experts of three tokens
    >>> bias.update(rate=0.1)
    >>> bias.value
    tensor([-0.1000,  0.0000,  0.1000])
    """

    value: Tensor

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("value", zeros)
        self.counts = torch.zeros_like(zeros, dtype=torch.int64)

    def forward(self, scores: Tensor, open_experts: Tensor | None = None) -> Tensor:
        """Add every expert's bias to its score.

        Parameters
        ----------
        scores : Tensor, shape (T, E), or (T, O) of open experts
        open_experts : Tensor of int64, shape (O,), optional
            The experts that the scores are of; by default all.
        """
        value = self.value if open_experts is None else self.value[open_experts]
        return scores + value.to(scores.dtype)

    def expert_rows(self, expert: int) -> dict[str, slice]:
        """Return the rows of one expert in the tensors of this module.

        Parameters
        ----------
        expert : int
        """
        return dict.fromkeys(("value", "counts"), slice(expert, expert + 1))

    def reset(self) -> None:
        """Set the bias and the counts to zero."""
        self.value.zero_()
        self.counts = torch.zeros_like(self.value, dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.value
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float32:
            moved = torch.zeros_like(self.value, dtype=torch.float32)
            self.value = moved if before.is_meta else moved.copy_(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.value = self.value.float()

    @torch.no_grad()
    def count(self, index: Tensor, mask: Tensor | None) -> None:
        """Count slots, but not in a backward pass, where checkpointing repeats a forward pass.

        Parameters
        ----------
        index : Tensor of int64, shape (T, k)
            Expert of every slot; index E marks a slot without an expert.
        mask : Tensor of bool, shape (T,), or None
            Tokens where it is False do not count.
        """
        if in_backward():
            return
        if self.counts.device != index.device:
            self.counts = torch.zeros_like(self.counts, device=index.device)
        self.counts += count_slots_per_expert(index, mask, self.counts.shape[0])

    @torch.no_grad()
    def update(self, rate: float, open_experts: Tensor | None = None) -> None:
        """Raise the bias of experts below the mean load by ``rate``; lower it above the mean.

        In a distributed run the load is the sum over all ranks.

        Parameters
        ----------
        rate : float
        open_experts : Tensor of int64, shape (O,), optional
            The experts whose biases move, and whose load is averaged; by default all.
        """
        counts = sum_over_ranks(self.counts).to(self.value.device, torch.float32)
        if open_experts is None:
            self.value += rate * (counts.mean() - counts).sign()
        else:
            counts = counts[open_experts]
            self.value[open_experts] += rate * (counts.mean() - counts).sign()
        self.counts.zero_()
