"""Sums over the ranks of a distributed run."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def number_of_ranks() -> int:
    """Return the number of ranks of the run; 1 where it is not distributed."""
    is_running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_running else 1


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without gradients.

    Parameters
    ----------
    tensor : Tensor
        Of the same shape on all ranks; it keeps its own numbers.
    """
    if number_of_ranks() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total
