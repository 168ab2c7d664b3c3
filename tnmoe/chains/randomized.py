"""The range of a large unfolding by random projection, with its error measured afterwards."""

from __future__ import annotations

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import WIDE_DTYPE
from tnmoe.chains.unfolding import GramMatrix, TriangularFactor

_OVERSAMPLING = 10
_FIRST_GUESS = 16
# The error may use this part of a budget; the rest is for choosing the rank within the subspace.
_SMALL_PART = 0.1
# The subspace has converged when one more iteration reduces the error by less than this.
_CONVERGED = 0.01
# Columns are looked at this many numbers at a time when the error is measured.
_BLOCK = 1 << 22


class RangeBasis:
    """The leading singular vectors of an unfolding, found already."""

    name = "randomized"

    def __init__(self, vectors: Array, values: Array, missed: np.ndarray) -> None:
        self._vectors, self._values, self.missed = vectors, values, missed

    def split(self, rows: int) -> tuple[Array, Array]:
        """The vectors and values that were found, whatever part of the rows is asked for."""
        return self._vectors, self._values


def find_range(
    xp: Backend,
    unfolding: Array,
    cap: int,
    budget: np.ndarray | None,
    rng: np.random.Generator,
) -> RangeBasis | None:
    """Leading left singular vectors of an unfolding, without its full decomposition.

    Parameters
    ----------
    xp : Backend
        Library of the unfolding.
    unfolding : array, shape (..., rows, columns)
    cap : int
        Largest rank that will be kept.
    budget : array, shape (batch,), optional
        Squared error that each matrix may have. Without it ``cap`` vectors will be kept.
    rng : numpy Generator
        Source of random numbers.

    Returns
    -------
    RangeBasis or None
        Vectors (..., rows, size), their Schmidt values (..., size) and the measured norm (batch,)
        of what lies outside their span. None where the subspace would be half of the whole.

    Notes
    -----
    Halko, Martinsson, Tropp, SIAM Rev. 53, 217 (2011): range finder (algorithm 4.1) with
    orthogonalised subspace iteration (4.4). Afterwards the error is measured: with a budget the
    subspace grows until the error is a small part of it; without, iteration goes on until the
    error no longer shrinks.
    """
    rows, columns = unfolding.shape[-2:]
    size = (cap if budget is None else min(cap, _FIRST_GUESS)) + _OVERSAMPLING
    last_cut = np.inf
    basis = None
    while 2 * size < min(rows, columns):
        if basis is None:
            numbers = xp.normal((columns, size), rng, like=unfolding)
            basis = xp.qr(unfolding @ numbers)[0]
        basis = _iterate(xp, unfolding, basis)
        inside = xp.adjoint(basis) @ unfolding
        missed = find_missed(xp, unfolding, basis, inside)
        vectors, values = _left_svd(xp, inside)
        found = RangeBasis(basis @ vectors, values, np.sqrt(missed))
        if budget is not None and (missed <= _SMALL_PART * budget).all():
            return found
        if budget is not None and size < cap + _OVERSAMPLING:
            size, basis = min(2 * size, cap + _OVERSAMPLING), None
            continue
        tail = (xp.to_numpy(values).astype(np.float64)[..., cap:] ** 2).sum(axis=-1)
        cut = missed + tail
        if (cut >= (1 - _CONVERGED) * last_cut).all():
            return found
        last_cut = cut
    return None


def _iterate(xp: Backend, unfolding: Array, basis: Array) -> Array:
    """One step of subspace iteration: the basis of A Aᴴ Q, orthogonalised half-way too."""
    half = xp.qr(xp.adjoint(unfolding) @ basis)[0]
    return xp.qr(unfolding @ half)[0]


def find_missed(xp: Backend, unfolding: Array, basis: Array, inside: Array) -> np.ndarray:
    """Squared norms (batch,) of A − Q (Qᴴ A), summed in double precision.

    ``inside`` is Qᴴ A. The difference is formed: as ‖A‖² − ‖Qᴴ A‖² it would drown in rounding.
    """
    rows, columns = unfolding.shape[-2:]
    step = max(1, _BLOCK // rows)
    missed: np.ndarray | float = 0.0
    for start in range(0, columns, step):
        block = slice(start, start + step)
        rest = unfolding[..., block] - basis @ inside[..., block]
        rest = rest.reshape(-1, rows, rest.shape[-1])
        missed = missed + np.array([float(xp.to_numpy(xp.norm(one))) ** 2 for one in rest])
    return np.asarray(missed)


def _left_svd(xp: Backend, inside: Array) -> tuple[Array, Array]:
    kind = GramMatrix if xp.dtype_name(inside) in WIDE_DTYPE else TriangularFactor
    return kind.of(xp, inside).split(inside.shape[-2])
