"""Rows of activations taken through a chain of cores, in which all but one are per expert.

Nothing is built: every expert's rows are multiplied by its own small cores, and the rows of all
experts together by the core they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnmoe.nn.compute.grouped import Groups, grouped_linear


def joint_linear(
    rows: Tensor, chains: Sequence[Sequence[Tensor]], groups: Groups
) -> tuple[Tensor, ...]:
    """Rows times their experts' matrices, core by core from the right, of one chain or several.

    Cores that chains have in common are contracted once. Only the same tensors count, from the
    right: the input sides of an up and a gate projection, if they are tied.

    Parameters
    ----------
    rows : Tensor, shape (T, in)
        Sorted by expert; ``in`` is the product of the cores' input legs.
    chains : sequence of sequence of Tensor, shapes (D, out, in, D') or (E, D, out, in, D')
        One core per site; those with an expert axis are each expert's own.
    groups : Groups
        Which rows are whose.

    Returns
    -------
    tuple of Tensor, shapes (T, out)
        Of every chain.

    Notes
    -----
    The state has axes (rows, inputs to come, bond to the cores already contracted, outputs so
    far). A core, as it lies, is the matrix (bond · output, input · bond) that takes it to the
    next one, so that neither is ever permuted. Where output legs lie left of the shared core and
    input legs right of it (:meth:`MPOShape.split`), the shared core is one dense product for all
    rows.
    """
    common = 0
    for sites in zip(*map(reversed, chains), strict=False):
        if len(chains) < 2 or any(core is not sites[0] for core in sites):
            break
        common += 1
    first = chains[0]
    state = _State(rows, rows.shape[1], 1).through(first[len(first) - common :], groups)
    ends = (state.through(cores[: len(cores) - common], groups) for cores in chains)
    return tuple(end.tensor.reshape(len(rows), end.outs) for end in ends)


@dataclass(frozen=True)
class _State:
    """Rows on their way: inputs to come, and outputs so far, of each."""

    tensor: Tensor
    rest: int
    outs: int

    def through(self, cores: Sequence[Tensor], groups: Groups) -> _State:
        state, rest, outs = self.tensor, self.rest, self.outs
        count = len(groups.experts)
        for core in reversed(cores):
            before, out, in_, after = core.shape[-4:]
            rest //= in_
            matrix = core.reshape(*core.shape[:-4], before * out, in_ * after)
            state = _multiply(state.reshape(count * rest, in_ * after, outs), matrix, groups, rest)
            outs *= out
        return _State(state, rest, outs)


def _multiply(state: Tensor, matrix: Tensor, groups: Groups, factor: int) -> Tensor:
    """Matrix times state (rows · factor, k, n); ``factor`` rows of it make one of a group."""
    if state.shape[2] == 1:
        rows = state.squeeze(2)
        if matrix.ndim == 2:
            return rows @ matrix.T
        return grouped_linear(rows, matrix, groups.offsets * factor)
    if matrix.ndim == 2:
        everyone = torch.full_like(groups.offsets[:1], len(state))
        return grouped_linear(state, matrix[None], everyone)
    return grouped_linear(state, matrix, groups.offsets * factor)
