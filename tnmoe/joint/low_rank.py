"""Matrices of low rank, every expert with its own rank: the best of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.precision import widened
from tnmoe.errors import InputError, check_index, check_int_from_zero, check_positive_int
from tnmoe.joint.allocation import Allocation, best_allocations
from tnmoe.joint.basis import checked_shares, tails
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.low_rank_factors import LowRankFactors
from tnmoe.joint.output_moments import OutputMoments
from tnmoe.joint.row_weights import checked_rows, roots_of_rows

__all__ = ["Allocation", "LowRank", "LowRankFactors", "low_rank"]


@dataclass(frozen=True)
class LowRank:
    """E matrices written as W_e ≈ L_e · [1 T_e] · P_e, for all ranks r_e and orders P_e of inputs.

    Attributes
    ----------
    size : (int, int, int)
        E, out and in.
    squared_errors : tuple of tuple of float
        For every expert, with rank r from 0 to min(out, in): share_e · ‖D_e^½ (W_e − Ŵ_e) S_e^½‖².
    index_numbers : int
        How many numbers the place of an input counts.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> matrices = rng.normal(size=(2, 6, 2)) @ rng.normal(size=(2, 2, 5))
    >>> part = low_rank(matrices)
    >>> factors = part.decompose(matrices, (2, 1))
    >>> [each.rank for each in factors], part.num_params((2, 1))
    ([2, 1], 38)
    >>> bool(np.allclose(factors[0].matrix(), matrices[0]))
    True
    >>> error = np.linalg.norm(factors[1].matrix() - matrices[1]) ** 2
    >>> bool(np.isclose(error, part.squared_errors[1][1]))
    True
    """

    size: tuple[int, int, int]
    squared_errors: tuple[tuple[float, ...], ...]
    index_numbers: int
    _metric: _Metric = field(repr=False)

    def num_params(self, ranks: Sequence[int]) -> int:
        """Count the stored numbers of :meth:`decompose`'s result, with the orders of inputs.

        Parameters
        ----------
        ranks : sequence of int
            For every expert.
        """
        return sum(self._cost(rank) for rank in self._checked(ranks))

    def _cost(self, rank: int) -> int:
        _, rows, columns = self.size
        return rank * (rows + columns - rank) + self.index_numbers * columns

    def frontier(self, step: int = 1, most: int = 64) -> list[Allocation]:
        """Return ranks of all experts with the least error, from the fewest numbers to the most.

        Parameters
        ----------
        step : int
            Ranks are multiples of it, or the largest one.
        most : int
            Largest number of allocations.

        Returns
        -------
        list of Allocation
            Points on the lower convex hull of all allocations. In the first all ranks are 0; the
            last one is exact. With ``most=1`` it is the only one.

        Raises
        ------
        InputError
            If a number is not positive.

        Examples
        --------
        >>> import numpy as np
        >>> matrices = np.stack([np.diag([3.0, 1.0]), np.diag([9.0, 0.0])])
        >>> [each.ranks for each in low_rank(matrices).frontier()]
        [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)]
        """
        step, most = check_positive_int("step", step), check_positive_int("most", most)
        largest = min(self.size[1:])
        ranks = np.array([*range(0, largest, step), largest])
        costs = np.array([self._cost(int(rank)) for rank in ranks])
        return best_allocations(ranks, costs, np.array(self.squared_errors)[:, ranks], most)

    def decompose(self, matrices: Array, ranks: Sequence[int]) -> list[LowRankFactors]:
        """Find the best matrices of some ranks, one expert in memory at a time.

        Parameters
        ----------
        matrices : array, shape (E, out, in)
            The matrices that this was made of.
        ranks : sequence of int
            For every expert, from 0 to min(out, in), which is exact.

        Returns
        -------
        list of LowRankFactors
            In the matrices' dtype.

        Raises
        ------
        InputError
            If there is another number of ranks, a rank is out of range, or an entry is too large
            for the dtype.
        """
        xp = get_backend(matrices)
        dtype, found = xp.dtype_name(matrices), []
        for expert, rank in enumerate(self._checked(ranks)):
            matrix = widened(xp, matrices[expert])
            with xp.full_precision(matrix):
                left, right = self._metric.best(xp, matrix, expert, rank)
                found.append(LowRankFactors.of(left, right, dtype))
        return found

    def _checked(self, ranks: Sequence[int]) -> list[int]:
        count, *sides = self.size
        if len(ranks) != count:
            raise InputError(f"ranks must hold {count} numbers, one per expert, got {len(ranks)}")
        return [check_index("a rank", rank, min(sides) + 1) for rank in ranks]


@dataclass(frozen=True)
class _Metric:
    """How errors of experts' matrices count: ‖D^½ (W − Ŵ) S^½‖², with S = R·Rᴴ.

    ``outputs`` holds W S Wᴴ, in place of S.
    """

    moments: InputMoments | None
    outputs: OutputMoments | None
    # D^½ of every expert, (E, out).
    rows: np.ndarray | None

    def gram(self, xp: Backend, matrix: Array, expert: int) -> Array:
        """Return M·Mᴴ or Mᴴ·M of M = D^½ W R, whichever is smaller, in double precision.

        With moments of outputs it is M·Mᴴ.
        """
        rows = self._rows(xp, matrix, expert)
        if self.outputs is not None:
            return rows * self.outputs.of_expert(expert, matrix) * xp.adjoint(rows)
        weighed = matrix * rows
        if weighed.shape[0] > weighed.shape[1]:
            white = weighed @ self._root(xp, matrix, expert)[0]
            return xp.adjoint(white) @ white
        seen = weighed
        if self.moments is not None:
            seen = weighed @ xp.astype(self.moments.of_expert(expert), xp.dtype_name(matrix))
        return seen @ xp.adjoint(weighed)

    def best(self, xp: Backend, matrix: Array, expert: int, rank: int) -> tuple[Array, Array]:
        """Return the factors of the best matrix of a rank, (out, r) and (r, in)."""
        if rank == matrix.shape[1]:
            return matrix, xp.eye(rank, like=matrix)
        _, vectors = xp.eigh(self.gram(xp, matrix, expert))
        vectors, rows = vectors[:, :rank], self._rows(xp, matrix, expert)
        if self.outputs is None and matrix.shape[0] > matrix.shape[1]:
            # Given the right factor, this left one is the best for every row, whatever it weighs.
            root, inverse = self._root(xp, matrix, expert)
            return matrix @ (root @ vectors), xp.adjoint(vectors) @ inverse
        # The projection of M on its leading left vectors, which needs no root of the moments.
        return vectors / rows, xp.adjoint(vectors) @ (matrix * rows)

    def _root(self, xp: Backend, matrix: Array, expert: int) -> tuple[Array, Array]:
        if self.moments is None:
            eye = xp.eye(matrix.shape[1], like=matrix)
            return eye, eye
        root, inverse = self.moments.root(expert)
        dtype = xp.dtype_name(matrix)
        return xp.astype(root, dtype), xp.astype(inverse, dtype)

    def _rows(self, xp: Backend, matrix: Array, expert: int) -> Array:
        """Return the roots of the weights of rows, (out, 1)."""
        rows = np.ones(matrix.shape[0]) if self.rows is None else self.rows[expert]
        return xp.from_numpy(rows, like=matrix)[:, None]


def low_rank(
    matrices: Array,
    *,
    moments: InputMoments | OutputMoments | None = None,
    rows: Array | None = None,
    shares: Sequence[float] | None = None,
    index_numbers: int = 1,
) -> LowRank:
    """Prepare low ranks that minimise Σ_e share_e ‖D_e^½ (W_e − Ŵ_e) S_e^½‖², D_e = diag(rows_e).

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    moments : InputMoments or OutputMoments, optional
        Second moments S of the inputs, in common or of every expert; by default the identity. Or
        those of the outputs of every expert.
    rows : array, shape (E, out) or (out,), optional
        Weights of output rows, from 0 up; by default all count 1. A row counts 1e-12 of the
        expert's largest weight at least.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    index_numbers : int
        How many numbers the place of an input counts in sizes: an order of inputs takes as many
        times ``in``.

    Returns
    -------
    LowRank

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    The best factors come from the truncated singular value decomposition of M = D^½ W R with
    S = R·Rᴴ (SVD-LLM: Wang et al., arXiv:2403.07378), by way of the eigenvectors of its smaller
    Gram matrix. S and D together are a Kronecker approximation of the Gauss-Newton matrix of the
    layer's output (Martens, Grosse, arXiv:1503.05671).
    """
    xp, size = get_backend(matrices), tuple(map(int, matrices.shape))
    counted = checked_shares(shares, size[0])
    index_numbers = check_int_from_zero("index_numbers", index_numbers)
    if moments is not None:
        moments.check(matrices)
    roots = None
    if rows is not None:
        weights = checked_rows(rows, matrices)
        roots = roots_of_rows(weights)
        # An expert whose rows all weigh 0 has no error, and gets a plain decomposition.
        counted = [share * bool(own.any()) for share, own in zip(counted, weights, strict=True)]
    if isinstance(moments, OutputMoments):
        metric = _Metric(None, moments, roots)
    else:
        metric = _Metric(moments, None, roots)
    errors = []
    for expert, share in enumerate(counted):
        matrix = widened(xp, matrices[expert])
        with xp.full_precision(matrix):
            values = xp.eigvalsh(metric.gram(xp, matrix, expert))
        errors.append(tuple(share * tail for tail in tails(xp, values)))
    return LowRank((size[0], size[1], size[2]), tuple(errors), index_numbers, metric)
