"""Reductions of an unfolding: all that its left singular vectors depend on, in a small matrix.

An unfolding A of R rows and very many columns enters a truncated decomposition only through its
left singular vectors and its Schmidt values. Both are those of a small R × R matrix: of the Gram
matrix A Aᴴ, or of the factor T in A = T Q. When the R rows are the legs of several sites, the
small matrix serves all their bonds, so the large one is read once.

Matrices lie along the last two axes; leading axes are a batch.
"""

from __future__ import annotations

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON, WIDE_DTYPE

# Numbers of an unfolding that are widened to double precision, or factored, at a time.
_BLOCK = 1 << 21

# Eigenvalues of a Gram matrix are wrong by less than this many units in the last place of its
# trace: by 0.7 in matrices of all kinds with up to 512 rows and 10⁵ columns.
_ROUNDING = 4.0

# A matrix this many times wider than tall is first reduced to a small square one.
_WIDE = 2
# A large one is reduced by blocks that are at least this many times wider than tall.
_WIDEST = 4


class GramMatrix:
    """The Gram matrix A Aᴴ, accumulated in double precision.

    Squaring halves the digits. Double precision leaves enough of them for a single-precision
    result; in single precision a value 10⁻⁴ of the largest would be 40 % wrong. For a result in
    double precision the rounding matters. The squares of the Schmidt values therefore include a
    bound on it: no value is reported too small.

    Parameters
    ----------
    xp : Backend
        Library of the matrix.
    gram : array, shape (..., R, R)
        The Gram matrix.
    dtype : str
        Dtype of the singular vectors to return.
    last : bool
        Whether the rows to split off next come last among the R, not first.
    """

    method = "eigh"

    def __init__(self, xp: Backend, gram: Array, dtype: str, last: bool) -> None:
        self._xp, self._gram, self._dtype, self._last = xp, gram, dtype, last

    @classmethod
    def of(cls, xp: Backend, unfolding: Array, last: bool = False) -> GramMatrix:
        """Reduce an unfolding (..., R, columns)."""
        dtype = xp.dtype_name(unfolding)
        rows, columns = unfolding.shape[-2:]
        step = max(1, _BLOCK // rows)
        gram = None
        for start in range(0, columns, step):
            block = unfolding[..., start : start + step]
            block = xp.astype(block, WIDE_DTYPE.get(dtype, dtype))
            product = block @ xp.adjoint(block)
            gram = product if gram is None else gram + product
        return cls(xp, gram, dtype, last)

    def singular_vectors(self, rows: int) -> tuple[Array, Array]:
        """Return left singular vectors (..., rows, rows) of the next rows, and Schmidt values."""
        marginal = self._marginal(rows)
        values, vectors = self._xp.eigh(marginal)
        return self._xp.astype(vectors, self._dtype), self._from_squares(values, marginal)

    def schmidt_values(self, rows: int) -> Array:
        """Return only the Schmidt values."""
        marginal = self._marginal(rows)
        return self._from_squares(self._xp.eigvalsh(marginal), marginal)

    def project(self, isometry: Array) -> GramMatrix:
        """Return the reduction after the next rows are projected onto an isometry's columns."""
        xp = self._xp
        adjoint = xp.adjoint(xp.astype(isometry, xp.dtype_name(self._gram)))
        half = xp.adjoint(_project_rows(adjoint, self._gram, self._last))
        return GramMatrix(xp, _project_rows(adjoint, half, self._last), self._dtype, self._last)

    def _from_squares(self, eigenvalues: Array, gram: Array) -> Array:
        """Take the square roots of eigenvalues, some of which rounding may have made negative."""
        squares = eigenvalues.clip(0)
        if self._dtype not in WIDE_DTYPE:
            total = self._xp.trace(gram, -2, -1).real
            squares = squares + _ROUNDING * EPSILON[self._dtype] * total[..., None]
        return squares**0.5

    def _marginal(self, rows: int) -> Array:
        """Return the Gram matrix of the next rows alone: the trace over the other rows."""
        *batch, size, _ = self._gram.shape
        if rows == size:
            return self._gram
        rest = size // rows
        sizes = (rest, rows) if self._last else (rows, rest)
        axes = (-4, -2) if self._last else (-3, -1)
        return self._xp.trace(self._gram.reshape(*batch, *sizes, *sizes), *axes)


class TriangularFactor:
    """The triangular factor T in A = T Q, as accurate as A itself.

    Parameters
    ----------
    xp : Backend
        Library of the matrix.
    factor : array, shape (..., R, columns)
        Any matrix with the same T Tᴴ as A Aᴴ, at least as wide as tall.
    last : bool
        Whether the rows to split off next come last among the R, not first.
    """

    method = "svd"

    def __init__(self, xp: Backend, factor: Array, last: bool) -> None:
        self._xp, self._factor, self._last = xp, factor, last

    @classmethod
    def of(cls, xp: Backend, unfolding: Array, last: bool = False) -> TriangularFactor:
        """Reduce an unfolding (..., R, columns)."""
        return cls(xp, _square(xp, unfolding), last)

    def singular_vectors(self, rows: int) -> tuple[Array, Array]:
        """Return left singular vectors (..., rows, rows) of the next rows, and Schmidt values."""
        return self._xp.left_svd(self._unfolding(rows))

    def schmidt_values(self, rows: int) -> Array:
        """Return only the Schmidt values."""
        return self.singular_vectors(rows)[1]

    def project(self, isometry: Array) -> TriangularFactor:
        """Return the reduction after the next rows are projected onto an isometry's columns."""
        adjoint = self._xp.adjoint(isometry)
        return TriangularFactor(
            self._xp, _project_rows(adjoint, self._factor, self._last), self._last
        )

    def _unfolding(self, rows: int) -> Array:
        *batch, size, columns = self._factor.shape
        if rows == size:
            return self._factor
        rest = size // rows
        factor = self._factor
        if self._last:
            factor = factor.reshape(*batch, rest, rows, columns)
            axes = range(factor.ndim)
            factor = self._xp.permute(factor, [*axes[:-3], axes[-2], axes[-3], axes[-1]])
        return _square(self._xp, factor.reshape(*batch, rows, rest * columns))


class RangeBasis:
    """The leading left singular vectors of an unfolding that a random projection found.

    Parameters
    ----------
    vectors : array, shape (..., R, size)
        Singular vectors.
    values : array, shape (..., size)
        Their Schmidt values.
    missed : array, shape (batch,)
        Measured norm of the part of the unfolding outside their span.
    """

    method = "randomized"

    def __init__(self, vectors: Array, values: Array, missed: np.ndarray) -> None:
        self._vectors, self._values, self.missed = vectors, values, missed

    def singular_vectors(self, rows: int) -> tuple[Array, Array]:
        """Return the vectors and Schmidt values; ``rows`` are all rows of the unfolding."""
        return self._vectors, self._values


Reduction = GramMatrix | TriangularFactor | RangeBasis


def reduction_method(xp: Backend, array: Array) -> str:
    """Choose the method for an array's dtype: "eigh" or "svd".

    A Gram matrix is the faster reduction. It is accurate enough where its dtype has a wider one to
    accumulate it in. An array without numbers keeps its dtype: JAX has no float64 by default, and
    takes derivatives where no setting of tnmoe reaches.
    """
    widens = xp.dtype_name(array) in WIDE_DTYPE and xp.has_numbers(array)
    return GramMatrix.method if widens else TriangularFactor.method


def reduce_unfolding(
    xp: Backend, unfolding: Array, method: str | None = None, last: bool = False
) -> GramMatrix | TriangularFactor:
    """Reduce an unfolding (..., R, columns) by a method, or by the one for its dtype.

    ``last`` says whether the rows to split off first come last among the R.
    """
    method = reduction_method(xp, unfolding) if method is None else method
    kind = GramMatrix if method == GramMatrix.method else TriangularFactor
    return kind.of(xp, unfolding, last)


def _project_rows(adjoint: Array, matrix: Array, last: bool) -> Array:
    """Multiply the first or last rows of a matrix (..., R, columns) by (..., rank, rows)."""
    rank, rows = adjoint.shape[-2:]
    *batch, size, columns = matrix.shape
    rest = size // rows
    if last:
        blocks = adjoint[..., None, :, :] @ matrix.reshape(*batch, rest, rows, columns)
    else:
        blocks = adjoint @ matrix.reshape(*batch, rows, rest * columns)
    return blocks.reshape(*batch, rank * rest, columns)


def _square(xp: Backend, matrix: Array) -> Array:
    """Return a matrix with the same A Aᴴ, at least as wide as tall and not much wider."""
    rows, columns = matrix.shape[-2:]
    if columns < _WIDE * rows:
        return matrix if columns >= rows else xp.pad(matrix, rows, rows)
    # Libraries copy a matrix to find its factor, some twice and in double precision. The factor of
    # a large one therefore grows block by block, unless derivatives would keep all blocks.
    step = max(_WIDEST * rows, _BLOCK // rows)
    if xp.tracked(matrix) or columns <= step:
        return xp.triangular_factor(matrix)
    factor = xp.triangular_factor(matrix[..., :step])
    for start in range(step, columns, step):
        block = matrix[..., start : start + step]
        factor = xp.triangular_factor(xp.concatenate([factor, block], -1))
    return factor
