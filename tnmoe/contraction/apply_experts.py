"""Chains of experts that share some cores, applied to the vectors of all experts together."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.backends import Array, Backend
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.contraction.plan import plan_for_chain
from tnmoe.shapes import MPOShape


def apply_experts(xp: Backend, shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply the chains of experts to vectors (E, batch, padded in) → (E, batch, padded out).

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    shape : MPOShape
        Legs of the chains.
    cores : sequence of array, shapes (D, out, in, D') or (E, D, out, in, D')
        Cores of all sites, left to right; those with an axis of experts are owned.
    vectors : array, shape (E, batch, padded in) or (1, batch, padded in)
        Vectors of each expert, or the same ones for all.
    """
    bonds = tuple(core.shape[-4] for core in cores[1:])
    if plan_for_chain(shape, bonds, vectors.shape[1]).route == "rebuilt":
        return vectors @ xp.transpose(to_padded_matrix(xp, cores))
    return _core_by_core(xp, cores, vectors)


def _core_by_core(xp: Backend, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply one core after the other, from the right, as ``apply_core_by_core`` does.

    The state has an axis of experts before those of one chain. Vectors of all experts meet a shared
    core in one product.
    """
    experts, batch, rest = vectors.shape
    rest *= batch
    state, last, outs = vectors, 1, 1
    for core in reversed(cores):
        *owners, left, out, in_, right = core.shape
        rest //= in_
        matrix = core.reshape(*owners, left * out, in_ * right)
        # (experts, bond, last, rest, in, outs) -> ([experts,] in · bond, [experts ·] rest · …)
        state = state.reshape(experts, right, last, rest, in_, outs)
        outs *= last
        if owners:
            state = xp.permute(state, (0, 4, 1, 3, 2, 5))
            state = matrix @ state.reshape(experts, in_ * right, rest * outs)
            experts = state.shape[0]
        else:
            state = xp.permute(state, (4, 1, 0, 3, 2, 5))
            state = matrix @ state.reshape(in_ * right, experts * rest * outs)
            state = xp.permute(state.reshape(left * out, experts, rest * outs), (1, 0, 2))
        last = out
    state = xp.permute(state.reshape(experts, last, batch, outs), (0, 2, 1, 3))
    return state.reshape(experts, batch, last * outs)
