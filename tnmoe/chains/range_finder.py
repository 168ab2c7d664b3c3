"""The range of a large unfolding by random projection, with its error measured afterwards."""

from __future__ import annotations

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.chains.unfolding import RangeBasis, reduce_unfolding

# Random vectors beyond the rank to find (Halko, Martinsson, Tropp 2011, section 4.2).
OVERSAMPLING = 10
# Rank to try first where a tolerance decides.
FIRST_RANK = 16
# Part of the allowed squared error that may lie outside the subspace. The rest is for choosing the
# rank within it.
_OUTSIDE_PART = 0.1
# The subspace has converged when one more iteration reduces the error by less than this part.
_CONVERGED = 0.01
# Numbers of an unfolding whose error is measured at a time.
_BLOCK = 1 << 22


def find_range(
    xp: Backend,
    unfolding: Array,
    cap: int,
    allowed: np.ndarray | None,
    rng: np.random.Generator,
) -> RangeBasis | None:
    """Find the leading left singular vectors of an unfolding without its full decomposition.

    Parameters
    ----------
    xp : Backend
        Library of the unfolding.
    unfolding : array, shape (..., rows, columns)
    cap : int
        Largest rank that will be kept.
    allowed : array, shape (batch,), optional
        Squared error that each matrix may have. Without it ``cap`` vectors will be kept.
    rng : numpy Generator
        Source of random numbers.

    Returns
    -------
    RangeBasis or None
        Vectors (..., rows, size), their Schmidt values (..., size), and the measured norm (batch,)
        of the part outside their span. None where the subspace would be half of the whole.

    Notes
    -----
    Halko, Martinsson, Tropp, SIAM Rev. 53, 217 (2011): range finder (algorithm 4.1) with
    orthogonalised subspace iteration (4.4). The error is measured afterwards. With a tolerance the
    subspace grows until the error is a small part of it. Without one, the iteration goes on until
    the error no longer shrinks.
    """
    rows, columns = unfolding.shape[-2:]
    size = (cap if allowed is None else min(cap, FIRST_RANK)) + OVERSAMPLING
    last_lost = np.inf
    basis = None
    while 2 * size < min(rows, columns):
        if basis is None:
            probes = xp.normal((columns, size), rng, like=unfolding)
            basis = xp.qr(unfolding @ probes)[0]
        basis = _iterate(xp, unfolding, basis)
        projected = xp.adjoint(basis) @ unfolding
        missed = squared_distance(xp, unfolding, basis, projected)
        vectors, values = reduce_unfolding(xp, projected).singular_vectors(size)
        found = RangeBasis(basis @ vectors, values, np.sqrt(missed))
        if allowed is not None and (missed <= _OUTSIDE_PART * allowed).all():
            return found
        if allowed is not None and size < cap + OVERSAMPLING:
            size, basis = min(2 * size, cap + OVERSAMPLING), None
            continue
        tail = (xp.to_numpy(values).astype(np.float64)[..., cap:] ** 2).sum(axis=-1)
        lost = missed + tail
        if (lost >= (1 - _CONVERGED) * last_lost).all():
            return found
        last_lost = lost
    return None


def _iterate(xp: Backend, unfolding: Array, basis: Array) -> Array:
    """Take one step of subspace iteration: orthogonalise Aᴴ Q, then A times that."""
    half = xp.qr(xp.adjoint(unfolding) @ basis)[0]
    return xp.qr(unfolding @ half)[0]


def squared_distance(xp: Backend, unfolding: Array, basis: Array, projected: Array) -> np.ndarray:
    """Return the squared norms (batch,) of A − Q (Qᴴ A), summed in double precision.

    ``projected`` is Qᴴ A. The difference is formed: as ‖A‖² − ‖Qᴴ A‖² it would drown in rounding.
    """
    rows, columns = unfolding.shape[-2:]
    step = max(1, _BLOCK // rows)
    squared: np.ndarray | float = 0.0
    for start in range(0, columns, step):
        block = slice(start, start + step)
        rest = unfolding[..., block] - basis @ projected[..., block]
        rest = rest.reshape(-1, rows, rest.shape[-1])
        squared = squared + np.array([float(xp.to_numpy(xp.norm(matrix))) ** 2 for matrix in rest])
    return np.asarray(squared)
