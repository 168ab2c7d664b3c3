"""The weights of an unfolding: all that its left singular vectors depend on, in a small matrix.

An unfolding A of R rows and very many columns enters a truncated decomposition only through its
left singular vectors and its Schmidt values. Both are those of a small R × R matrix: of the Gram
matrix A Aᴴ, or of the factor T in A = T Q. When the R rows are the legs of several sites, the
small matrix serves all their bonds, so the large one is read once.

Matrices lie along the last two axes; leading axes are a batch.
"""

from __future__ import annotations

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON, WIDE_DTYPE

# Columns of an unfolding are widened to double precision this many numbers at a time.
_BLOCK = 1 << 21

# Eigenvalues of a Gram matrix are wrong by less than this many units in the last place of its
# trace: by 0.7 in matrices of all kinds with up to 512 rows and 10⁵ columns.
_ROUNDING = 4.0

# A matrix this many times wider than tall is first reduced to a small square one.
_WIDE = 2
# What it is reduced by at a time is at least this many times wider.
_WIDEST = 4


class GramMatrix:
    """A Aᴴ, accumulated in double precision.

    Squaring halves the digits. In double precision enough are left for a single-precision result;
    in single precision a value 10⁻⁴ of the largest would be 40 % wrong. For a result in double
    precision the rounding counts: it is added to the squares of Schmidt values, so that what they
    promise to be small is.

    Parameters
    ----------
    xp : Backend
        Library of the matrix.
    gram : array, shape (..., R, R)
        The Gram matrix.
    dtype : str
        Dtype that singular vectors are returned in.
    last : bool
        Whether the rows to split off next come last among the R, not first.
    """

    name = "eigh"

    def __init__(self, xp: Backend, gram: Array, dtype: str, last: bool) -> None:
        self._xp, self._gram, self._dtype, self._last = xp, gram, dtype, last

    @classmethod
    def of(cls, xp: Backend, unfolding: Array, last: bool = False) -> GramMatrix:
        """Weights of an unfolding (..., R, columns)."""
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

    def split(self, rows: int) -> tuple[Array, Array]:
        """Left singular vectors (..., rows, rows) of the next rows, and Schmidt values."""
        marginal = self._marginal(rows)
        values, vectors = self._xp.eigh(marginal)
        return self._xp.astype(vectors, self._dtype), self._schmidt(values, marginal)

    def values(self, rows: int) -> Array:
        """Only the Schmidt values."""
        marginal = self._marginal(rows)
        return self._schmidt(self._xp.eigvalsh(marginal), marginal)

    def project(self, isometry: Array) -> GramMatrix:
        """Weights after the next rows are projected onto the columns of an isometry."""
        xp = self._xp
        adjoint = xp.adjoint(xp.astype(isometry, xp.dtype_name(self._gram)))
        half = xp.adjoint(_project_rows(adjoint, self._gram, self._last))
        return GramMatrix(xp, _project_rows(adjoint, half, self._last), self._dtype, self._last)

    def _schmidt(self, values: Array, gram: Array) -> Array:
        """Square roots of eigenvalues, whose rounding may take them below 0."""
        squares = values.clip(0)
        if self._dtype not in WIDE_DTYPE:
            total = self._xp.trace(gram, -2, -1).real
            squares = squares + _ROUNDING * EPSILON[self._dtype] * total[..., None]
        return squares**0.5

    def _marginal(self, rows: int) -> Array:
        """Gram matrix of the next rows alone: the trace over the others."""
        *batch, size, _ = self._gram.shape
        if rows == size:
            return self._gram
        others = size // rows
        sizes = (others, rows) if self._last else (rows, others)
        axes = (-4, -2) if self._last else (-3, -1)
        return self._xp.trace(self._gram.reshape(*batch, *sizes, *sizes), *axes)


class TriangularFactor:
    """The triangular factor T in A = T Q: as accurate as A itself.

    Parameters
    ----------
    xp : Backend
        Library of the matrix.
    factor : array, shape (..., R, columns)
        Any matrix with the same T Tᴴ as A Aᴴ, at least as wide as tall.
    last : bool
        Whether the rows to split off next come last among the R, not first.
    """

    name = "svd"

    def __init__(self, xp: Backend, factor: Array, last: bool) -> None:
        self._xp, self._factor, self._last = xp, factor, last

    @classmethod
    def of(cls, xp: Backend, unfolding: Array, last: bool = False) -> TriangularFactor:
        """Weights of an unfolding (..., R, columns)."""
        return cls(xp, _square(xp, unfolding), last)

    def split(self, rows: int) -> tuple[Array, Array]:
        """Left singular vectors (..., rows, rows) of the next rows, and Schmidt values."""
        return self._xp.left_svd(self._unfolding(rows))

    def values(self, rows: int) -> Array:
        """Only the Schmidt values."""
        return self.split(rows)[1]

    def project(self, isometry: Array) -> TriangularFactor:
        """Weights after the next rows are projected onto the columns of an isometry."""
        adjoint = self._xp.adjoint(isometry)
        return TriangularFactor(
            self._xp, _project_rows(adjoint, self._factor, self._last), self._last
        )

    def _unfolding(self, rows: int) -> Array:
        *batch, size, columns = self._factor.shape
        if rows == size:
            return self._factor
        others = size // rows
        factor = self._factor
        if self._last:
            factor = factor.reshape(*batch, others, rows, columns)
            axes = range(factor.ndim)
            factor = self._xp.permute(factor, [*axes[:-3], axes[-2], axes[-3], axes[-1]])
        return _square(self._xp, factor.reshape(*batch, rows, others * columns))


def _project_rows(adjoint: Array, matrix: Array, last: bool) -> Array:
    """A matrix (..., R, columns) whose first or last rows are multiplied by (..., rank, rows)."""
    rank, rows = adjoint.shape[-2:]
    *batch, size, columns = matrix.shape
    others = size // rows
    if last:
        blocks = adjoint[..., None, :, :] @ matrix.reshape(*batch, others, rows, columns)
    else:
        blocks = adjoint @ matrix.reshape(*batch, rows, others * columns)
    return blocks.reshape(*batch, rank * others, columns)


def _square(xp: Backend, matrix: Array) -> Array:
    """At least as wide as tall, and not much wider, with the same A Aᴴ."""
    rows, columns = matrix.shape[-2:]
    if columns < _WIDE * rows:
        return matrix if columns >= rows else xp.pad(matrix, rows, rows)
    # Libraries copy a matrix to find its factor, some twice and in double precision. So the factor
    # of a large one grows block by block; but not where derivatives would keep all blocks.
    step = max(_WIDEST * rows, _BLOCK // rows)
    if xp.tracked(matrix) or columns <= step:
        return xp.triangle(matrix)
    factor = xp.triangle(matrix[..., :step])
    for start in range(step, columns, step):
        block = matrix[..., start : start + step]
        factor = xp.triangle(xp.concatenate([factor, block], -1))
    return factor
