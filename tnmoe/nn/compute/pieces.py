"""Rows that go through in pieces, so that what lies in between has a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tnmoe.nn.compute.grouped import Groups
from tnmoe.nn.compute.half_precision import reused
from tnmoe.nn.transforms import needs_native_operators

Through = Callable[[Tensor, list[Tensor], Groups], Sequence[Tensor]]


def in_pieces(
    through: Through, rows: Tensor, cores: Sequence[Tensor], groups: Groups, step: int
) -> Sequence[Tensor]:
    """What a function gives of rows, ``step`` of them after the other.

    In training a piece is computed again for the backward, which keeps nothing of it till then.
    The gradients of the cores add up in float32 at least.

    Parameters
    ----------
    through : callable
        Takes rows, cores in their dtype and groups, and returns tensors with as many rows, each of
        which depends on no other.
    rows : Tensor, shape (T, n)
        Sorted by expert.
    cores : sequence of Tensor
    groups : Groups
        Which rows are whose.
    step : int

    Returns
    -------
    sequence of Tensor, shapes (T, ...)
    """
    if len(rows) <= step:
        return through(rows, [core.to(rows.dtype) for core in cores], groups)
    uses = [reused(core, rows.dtype) for core in cores]
    # The transformations of torch.func do not let anything be computed again.
    again = torch.is_grad_enabled() and not needs_native_operators()
    results, start = [], 0
    for piece in rows.split(step):
        inputs = piece, [use() for use in uses], groups.part(start, start + len(piece))
        start += len(piece)
        if again:
            made = checkpoint(through, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            made = through(*inputs)
        results.append(made)
    return [torch.cat(parts) for parts in zip(*results, strict=True)]
