"""Rows of activations taken through a chain of cores, in which all but one are per expert.

Nothing is built: every expert's rows are multiplied by its own small cores, and the rows of all
experts together by the core they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from tnmoe.nn.grouped import Groups, grouped_linear


def chain_linear(rows: Tensor, cores: Sequence[Tensor], groups: Groups) -> Tensor:
    """Rows times their experts' matrices, core by core from the right.

    Parameters
    ----------
    rows : Tensor, shape (T, in)
        Sorted by expert; ``in`` is the product of the cores' input legs.
    cores : sequence of Tensor, shapes (D, out, in, D') or (E, D, out, in, D')
        One core per site; those with an expert axis are each expert's own.
    groups : Groups
        Which rows are whose.

    Returns
    -------
    Tensor, shape (T, out)

    Notes
    -----
    Where output legs lie left of the shared core and input legs right of it
    (:meth:`MPOShape.split`), the shared core is one dense product for all rows, and no axis is
    moved before the end.
    """
    count = rows.shape[0]
    rest = rows.shape[1]
    outs: list[int] = []
    bond = 1
    # State: (rows, inputs to come, outputs so far, bond to the cores already contracted)
    state = rows
    for core in reversed(cores):
        before, out, in_, _ = core.shape[-4:]
        rest //= in_
        state = state.reshape(count, rest, in_, prod(outs), bond).transpose(2, 3)
        state = _multiply(state.reshape(-1, in_ * bond), core, groups, rest * prod(outs))
        outs.append(out)
        bond = before
    # The legs lie last site first.
    legs = state.reshape(count, *outs)
    return legs.permute(0, *range(len(outs), 0, -1)).reshape(count, prod(outs))


def _multiply(state: Tensor, core: Tensor, groups: Groups, factor: int) -> Tensor:
    """(rows, in · D') → (rows, out · D) by a core; ``factor`` of these rows make one of a group."""
    if core.ndim == 4:
        before, out, in_, after = core.shape
        return state @ core.permute(2, 3, 1, 0).reshape(in_ * after, out * before)
    experts, before, out, in_, after = core.shape
    weight = core.transpose(1, 2).reshape(experts, out * before, in_ * after)
    return grouped_linear(state, weight, groups.offsets * factor)
