"""Chains of cores applied to vectors, in the order that a contraction plan finds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tnmoe.backends import Array, Backend
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.contraction.core_by_core import (
    apply_core_by_core,
    core_by_core_width,
    is_core_by_core_faster,
)
from tnmoe.contraction.einsum import Contraction, Shapes
from tnmoe.contraction.paths import CoreShapes, Network, applying_path, shapes_of
from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.contraction.plan import plan_for_chain
from tnmoe.shapes import MPOShape, chain_shapes


def apply_cores(xp: Backend, shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply a chain of cores to vectors (batch, padded in) → (batch, padded out).

    The batch goes through in pieces where a state would have more entries than
    ``contraction.pieces.STATE_LIMIT``.
    """
    batch, bonds = vectors.shape[0], tuple(core.shape[0] for core in cores[1:])
    step = rows_per_piece(state_width(shape, bonds, batch), max(shape.padded_in, shape.padded_out))
    if batch <= step:
        return _apply_at_once(xp, shape, cores, vectors)
    starts = range(0, batch, step)
    pieces = [_apply_at_once(xp, shape, cores, vectors[at : at + step]) for at in starts]
    return xp.concatenate(pieces, 0)


@lru_cache(maxsize=4096)
def state_width(shape: MPOShape, bonds: tuple[int, ...], batch: int) -> float:
    """Return the entries per vector of the largest state of :func:`apply_cores`."""
    plan = plan_for_chain(shape, bonds, batch)
    if plan.route != "chain":
        return 0
    if is_core_by_core_faster(chain_shapes(shape, bonds), batch, plan.flops):
        return core_by_core_width(shape, bonds)
    # Products of cores alone are no larger than the matrix: a larger array holds vectors.
    holds_vectors = plan.peak_elements > shape.padded_out * shape.padded_in
    return plan.peak_elements / batch if holds_vectors else 0


def _apply_at_once(xp: Backend, shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    batch, core_shapes = vectors.shape[0], shapes_of(cores)
    plan = plan_for_chain(shape, tuple(core[0] for core in core_shapes[1:]), batch)
    if plan.route == "rebuilt":
        return vectors @ xp.transpose(to_padded_matrix(xp, cores))
    if is_core_by_core_faster(core_shapes, batch, plan.flops):
        return apply_core_by_core(xp, cores, vectors)
    contraction, shapes = _contraction(core_shapes, batch)
    operands = [array.reshape(size) for array, size in zip([vectors, *cores], shapes, strict=True)]
    return contraction(xp, operands).reshape(batch, shape.padded_out)


@lru_cache(maxsize=4096)
def _contraction(cores: CoreShapes, batch: int) -> tuple[Contraction, Shapes]:
    """Return the contraction of cores with vectors, and the shapes that it takes them in."""
    network = Network.of(cores, has_vectors=True).without_units()
    shapes = network.shapes(batch)
    return Contraction(network.equation(), shapes, applying_path(cores, batch).path), shapes
