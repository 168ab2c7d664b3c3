"""The gauge of a matrix of low rank in which some of its columns stand in one factor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import narrowed


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix of rank r, in the gauge W[:, columns] = L · [1 T], with r (out + in − r) numbers.

    Attributes
    ----------
    outer : array, shape (out, r)
        L: r columns of the matrix.
    inner : array, shape (r, in − r)
        T: how the other columns are composed of them.
    columns : array of int64, shape (in,)
        The input of every column of [1 T]. The first r ascend, and so do the others.

    Examples
    --------
    >>> import numpy as np
    >>> left, right = np.array([[1.0], [2.0]]), np.array([[1.0, 4.0, 2.0]])
    >>> factors = LowRankFactors.of(left, right, "float64")
    >>> factors.outer.tolist(), factors.columns.tolist()
    ([[4.0], [8.0]], [1, 0, 2])
    >>> bool(np.allclose(factors.inner, [[0.25, 0.5]]))
    True
    >>> bool(np.allclose(factors.matrix(), left @ right))
    True
    """

    outer: Array = field(repr=False)
    inner: Array = field(repr=False)
    columns: Array = field(repr=False)

    @classmethod
    def of(cls, left: Array, right: Array, dtype: str) -> LowRankFactors:
        """Turn two factors into the gauge.

        Parameters
        ----------
        left, right : array, shapes (out, r) and (r, in)
            In double precision, with r from 0 to in.
        dtype : str
            Name of the dtype of the result.

        Raises
        ------
        InputError
            If an entry is too large for the dtype.

        Notes
        -----
        An interpolative decomposition (Cheng, Gimbutas, Martinsson, Rokhlin, SIAM J. Sci. Comput.
        26, 1389 (2005)): a QR decomposition with pivoting chooses the columns, which keeps the
        entries of T moderate.
        """
        xp, (rank, size) = get_backend(right), map(int, right.shape)
        order = np.arange(size)
        if rank in (0, size):
            outer, inner = (left @ right)[:, :rank], right[:, rank:]
        else:
            # Orthonormal rows keep all directions apart from rounding, however little they carry.
            basis, triangle = xp.qr(xp.adjoint(right))
            rows = xp.to_numpy(xp.adjoint(basis))
            order, composed = _choose(rows)
            kept = xp.from_numpy(rows[:, order[:rank]], like=right)
            outer = left @ (xp.adjoint(triangle) @ kept)
            inner = xp.from_numpy(composed, like=right)
        # Only ``like`` says where the array is to be.
        columns = xp.astype(xp.from_numpy(order.astype(np.float64), like=right.real), "int64")
        outer, inner = narrowed(xp, [outer, inner], dtype)
        return cls(outer, inner, columns)

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.outer.shape[1])

    def matrix(self) -> Array:
        """Return the matrix, (out, in)."""
        xp = get_backend(self.outer)
        inner = xp.to_numpy(self.inner)
        right = np.empty((self.rank, sum(inner.shape)), inner.dtype)
        right[:, xp.to_numpy(self.columns)] = np.hstack([np.eye(self.rank), inner])
        with xp.full_precision(self.outer):
            return self.outer @ xp.from_numpy(right, like=self.outer)


def _choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose r columns of rows (r, in); return the order that begins with them, and T.

    rows[:, others] = rows[:, chosen] · T
    """
    from scipy.linalg import qr, solve_triangular

    rank = rows.shape[0]
    triangle, pivots = qr(rows, mode="r", pivoting=True)
    composed = solve_triangular(triangle[:, :rank], triangle[:, rank:])
    chosen, others = np.argsort(pivots[:rank]), np.argsort(pivots[rank:])
    order = np.concatenate([pivots[:rank][chosen], pivots[rank:][others]])
    return order, composed[chosen][:, others]
