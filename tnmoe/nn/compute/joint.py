"""Rows of all experts taken together through the cores, from the right: the route ``joint``.

No matrix is built. Every expert's rows are multiplied by its own small cores, and the rows of all
experts together by each core that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnmoe.contraction.core_by_core import core_by_core_width
from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.grouped import grouped_linear, selected_linear, shared_linear
from tnmoe.nn.compute.pieces import apply_in_pieces
from tnmoe.nn.compute.slots import Groups, SlotOrder, UnsortedSlots

_cached_width = lru_cache(maxsize=4096)(core_by_core_width)


def joint_linear(rows: Tensor, cores: ExpertCores, groups: Groups) -> Tensor:
    """Multiply padded rows by their experts' matrices, core by core from the right.

    Parameters and result are those of :func:`tnmoe.nn.compute.routes.expert_linear`.

    Notes
    -----
    The state has axes (rows, inputs to come, bond to the cores already contracted, outputs so
    far). A core, as it is stored, is the matrix (bond · output, input · bond) that takes one state
    to the next, so neither is ever permuted. Where output legs lie left of the shared core and
    input legs right of it (:meth:`MPOShape.split`), the shared core is one dense product for all
    rows.
    """
    return tied_joint_linear(rows, [cores], groups)[0]


def tied_joint_linear(
    rows: Tensor, projections: Sequence[ExpertCores], groups: Groups
) -> Sequence[Tensor]:
    """Multiply the same padded rows by the matrices of several projections of one shape.

    The last cores, as far as the projections store the same tensors there, are contracted once:
    for instance the input sides of an up and a gate projection, if they are tied.

    Parameters
    ----------
    rows, groups
        As for :func:`joint_linear`.
    projections : sequence of ExpertCores
        The cores of each projection.

    Returns
    -------
    sequence of Tensor, shapes (N, padded out)
        One per projection.
    """
    sites = projections[0].shape.sites
    separate = sites - _count_tied(projections)

    def through_cores(rows: Tensor, cores: list[Tensor], groups: Groups) -> Sequence[Tensor]:
        tied, rest = cores[: sites - separate], cores[sites - separate :]
        state = State(rows, rows.shape[1], 1).through(tied, groups)
        chains = (rest[n * separate : (n + 1) * separate] for n in range(len(projections)))
        ends = (state.through(chain, groups) for chain in chains)
        return [end.tensor for end in ends]

    chains = [projection.sites() for projection in projections]
    cores = [*chains[0][separate:], *(core for chain in chains for core in chain[:separate])]
    step = min(map(_rows_at_once, projections))
    return apply_in_pieces(through_cores, rows, cores, groups, step)


def _rows_at_once(cores: ExpertCores) -> int:
    # The tracer of torch.compile warns of functions that are cached.
    width_of = core_by_core_width if torch.compiler.is_compiling() else _cached_width
    width = width_of(cores.shape, cores.bond_dims)
    return rows_per_piece(width, max(cores.shape.padded_in, cores.shape.padded_out))


def _count_tied(projections: Sequence[ExpertCores]) -> int:
    """Count the last sites at which several projections store the same tensors."""
    if len(projections) < 2:
        return 0
    count = 0
    for cores in zip(*(reversed(projection.stored) for projection in projections), strict=True):
        if any(core is not cores[0] for core in cores):
            break
        count += 1
    return count


@dataclass(frozen=True)
class State:
    """Rows between two cores.

    Attributes
    ----------
    tensor : Tensor
        One row per vector, with axes (inputs to come, bond, outputs so far) merged.
    inputs : int
        Size, per row, of the input legs that no core has taken yet.
    outputs : int
        Size, per row, of the output legs so far.
    """

    tensor: Tensor
    inputs: int
    outputs: int

    def through(self, cores: Sequence[Tensor], groups: SlotOrder | None) -> State:
        """Contract a chain of cores, from the right; without groups all cores are shared."""
        state, inputs, outputs = self.tensor, self.inputs, self.outputs
        count = state.shape[0]
        for core in reversed(cores):
            *experts, before, out, in_, after = core.shape
            inputs //= in_
            matrix = core.reshape(*experts, before * out, in_ * after)
            state = state.reshape(count * inputs, in_ * after, outputs)
            state = _multiply(state, matrix, groups, inputs)
            # The rows of a token have become those of its slots, if these are not sorted.
            count = state.shape[0] // inputs
            outputs *= out
            state = state.reshape(count, inputs * before * outputs)
        return State(state, inputs, outputs)


def _multiply(state: Tensor, matrix: Tensor, groups: SlotOrder | None, factor: int) -> Tensor:
    """Multiply a state (rows · factor, k, n); ``factor`` rows of it belong to one row."""
    if matrix.ndim == 3 and matrix.shape[0] == 1:
        # Torch's own product, which costs less than the operator for groups.
        matrix = matrix[0]
    if matrix.ndim == 2:
        if state.shape[2] == 1:
            return state.squeeze(2) @ matrix.T
        return shared_linear(state, matrix)
    assert groups is not None, "cores that experts own need the experts of the rows"
    rows = state.squeeze(2) if state.shape[2] == 1 else state
    if isinstance(groups, UnsortedSlots):
        return selected_linear(rows, matrix, groups, factor)
    return grouped_linear(rows, matrix, groups.offsets * factor)
