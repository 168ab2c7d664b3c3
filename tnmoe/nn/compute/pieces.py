"""Rows that are computed in pieces, to bound the memory of intermediate arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tnmoe.nn.compute.half_precision import cast_for_reuse
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.transforms import needs_native_operators

# A function of rows in the order of experts, of cores in the dtype of the rows, and of the groups
# of the rows.
RowFunction = Callable[[Tensor, list[Tensor], Groups], Sequence[Tensor]]


def apply_in_pieces(
    function: RowFunction, rows: Tensor, cores: Sequence[Tensor], groups: Groups, step: int
) -> Sequence[Tensor]:
    """Apply a function to pieces of ``step`` rows, one after the other.

    In training the backward computes each piece again, and the forward keeps nothing of it. The
    gradients of the cores are summed in float32 at least.

    Parameters
    ----------
    function : callable
        Takes rows, cores in the dtype of the rows, and groups. Returns tensors with as many rows.
        Each row of the result depends on the same row of the input alone.
    rows : Tensor, shape (N, n)
        In the order of experts.
    cores : sequence of Tensor
        In any dtype.
    groups : Groups
        Which rows belong to which expert.
    step : int
        Rows of a piece.

    Returns
    -------
    sequence of Tensor, shapes (N, ...)
    """
    if len(rows) <= step:
        return function(rows, [core.to(rows.dtype) for core in cores], groups)
    uses = [cast_for_reuse(core, rows.dtype) for core in cores]
    # Transformations of torch.func forbid checkpoints.
    recompute = torch.is_grad_enabled() and not needs_native_operators()
    results, start = [], 0
    for piece in rows.split(step):
        inputs = piece, [use() for use in uses], groups.part(start, start + len(piece))
        start += len(piece)
        if recompute:
            result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            result = function(*inputs)
        results.append(result)
    return [torch.cat(parts) for parts in zip(*results, strict=True)]
