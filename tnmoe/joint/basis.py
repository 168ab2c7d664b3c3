"""A basis that the rows, or the columns, of many matrices have in common: the best for any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.precision import computable, narrowed, precise, widened
from tnmoe.errors import InputError, check_index
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.row_weights import checked_rows
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO


@dataclass(frozen=True)
class SharedBasis:
    """A basis for the rows or the columns of E matrices, most important vector first.

    Attributes
    ----------
    side : {"rows", "columns"}
        ``rows``: W_e ≈ L_e · C with C (r, in) shared. ``columns``: W_e ≈ C · R_e with C (out, r).
    squared_errors : tuple of float
        Of the first r vectors, for r from 0 on: Σ_e share_e · ‖D_e^½ (W_e − Ŵ_e) S^½‖².

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> matrices = rng.normal(size=(3, 6, 2)) @ rng.normal(size=(2, 5))
    >>> basis = row_basis(matrices)
    >>> shared = basis.decompose(matrices, 2)
    >>> shared.bond_dims, bool(np.allclose(shared.to_matrices(), matrices))
    ((2,), True)
    """

    side: str
    squared_errors: tuple[float, ...]
    # Shared core of all vectors (n, n) and what gives owned cores: W_e · into, or intoᴴ · W_e.
    _core: Array = field(repr=False)
    _into: Array = field(repr=False)

    def num_params(self, matrices: Array, size: int) -> int:
        """Count the parameters of :meth:`decompose`'s result."""
        count, rows, columns = matrices.shape
        shared, owned = (columns, rows) if self.side == "rows" else (rows, columns)
        return size * (shared + count * owned)

    def decompose(self, matrices: Array, size: int) -> SharedMPO:
        """Write matrices in the first vectors of the basis.

        Parameters
        ----------
        matrices : array, shape (E, out, in)
            The matrices that the basis was made of.
        size : int
            Number of vectors r, the bond dimension.

        Returns
        -------
        SharedMPO
            Of two sites, in the matrices' dtype. Experts share the core of one of them.

        Raises
        ------
        InputError
            If the basis does not have as many vectors.
        """
        size = 1 + check_index("size - 1", size - 1, len(self.squared_errors) - 1)
        xp = get_backend(matrices)
        dtype, (count, rows, columns) = xp.dtype_name(matrices), matrices.shape
        work = computable(xp, matrices)
        core = xp.astype(self._core, xp.dtype_name(work))
        into = xp.astype(self._into, xp.dtype_name(work))
        with xp.full_precision(work):
            if self.side == "rows":
                # Orthonormal rows lose least when they are rounded.
                core, triangle = xp.qr(xp.adjoint(core[:size]))
                into = into[:, :size] @ xp.adjoint(triangle)
                owned = (work @ into).reshape(count, 1, rows, 1, size)
                cores = [owned, xp.adjoint(core).reshape(size, 1, columns, 1)]
            else:
                owned = (xp.adjoint(into[:, :size]) @ work).reshape(count, size, 1, columns, 1)
                cores = [core[:, :size].reshape(1, rows, 1, size), owned]
        shape = MPOShape((rows, 1), (1, columns))
        return SharedMPO(narrowed(xp, cores, dtype), shape, int(self.side == "rows"))


def row_basis(
    matrices: Array,
    *,
    shares: Sequence[float] | None = None,
    moments: InputMoments | None = None,
    rows: Array | None = None,
) -> SharedBasis:
    """Find the basis of the rows that minimises Σ_e share_e ‖D_e^½ (W_e − L_e·C) S^½‖².

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    moments : InputMoments, optional
        Second moments S of the inputs, which all experts have in common; by default the identity.
    rows : array, shape (E, out) or (out,), optional
        Weights of output rows from 0 up, the diagonals of D_e; by default all count 1.

    Returns
    -------
    SharedBasis

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    With S = R·Rᴴ, the rows of C are the leading eigenvectors of Σ_e share_e Rᴴ W_eᴴ D_e W_e R,
    times R⁻¹: the theorem of Eckart and Young for all D_e^½ W_e R one below another. The owned
    factors are the best ones for every row, whatever it weighs.
    """
    xp = get_backend(matrices)
    shares = checked_shares(shares, matrices.shape[0])
    if moments is not None:
        moments.check(matrices, common=True)
    weights = None if rows is None else np.sqrt(checked_rows(rows, matrices))
    with xp.full_precision(computable(xp, matrices)):
        wide = weighed(xp, matrices, weights)
        gram = sum_of(
            xp.adjoint(each) @ each * share for each, share in zip(wide, shares, strict=True)
        )
        if moments is None:
            values, vectors = xp.eigh(gram)
            return SharedBasis("rows", tails(xp, values), xp.adjoint(vectors), vectors)
        gram = widened(xp, gram)
        root, inverse = (xp.astype(each, xp.dtype_name(gram)) for each in moments.root())
        values, vectors = xp.eigh(xp.adjoint(root) @ gram @ root)
        core, into = xp.adjoint(vectors) @ inverse, root @ vectors
        return SharedBasis("rows", tails(xp, values), core, into)


def column_basis(
    matrices: Array, *, shares: Sequence[float] | None = None, outputs: Array | None = None
) -> SharedBasis:
    """Find the basis of the columns of matrices that minimises Σ_e share_e ‖(W_e − C·R_e) S_e^½‖².

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    outputs : array, shape (out, out), optional
        Second moments of the outputs of all experts, Σ_e share_e W_e S_e W_eᴴ, instead.

    Returns
    -------
    SharedBasis

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    The columns of C are the leading eigenvectors of the outputs' second moments, and R_e = Cᴴ·W_e,
    whatever S_e is.
    """
    xp = get_backend(matrices)
    with xp.full_precision(computable(xp, matrices)):
        if outputs is None:
            outputs = column_gram(matrices, shares)
        elif tuple(outputs.shape) != (matrices.shape[1],) * 2:
            raise InputError(
                f"outputs must have shape {(matrices.shape[1],) * 2}, got {tuple(outputs.shape)}"
            )
        values, vectors = xp.eigh(widened(xp, outputs))
        return SharedBasis("columns", tails(xp, values), vectors, vectors)


def column_gram(matrices: Array, shares: Sequence[float] | None = None) -> Array:
    """Return Σ_e share_e W_e W_eᴴ, (out, out), of matrices (E, out, in)."""
    xp = get_backend(matrices)
    checked = checked_shares(shares, matrices.shape[0])
    wide = (precise(xp, each) for each in matrices)
    return sum_of(
        each @ xp.adjoint(each) * share for each, share in zip(wide, checked, strict=True)
    )


def weighed(xp: Backend, matrices: Array, roots: np.ndarray | None) -> Iterator[Array]:
    """Yield D_e^½ W_e for roots of weights of rows (E, out), one in memory at a time."""
    for expert, matrix in enumerate(matrices):
        wide = precise(xp, matrix)
        if roots is not None:
            wide = wide * xp.from_numpy(roots[expert], like=wide)[:, None]
        yield wide


def checked_shares(shares: Sequence[float] | None, experts: int) -> list[float]:
    """Return how much every expert counts; raise an InputError for other numbers."""
    if shares is None:
        return [1.0] * experts
    checked = [float(share) for share in shares]
    if len(checked) != experts or not all(share >= 0 for share in checked) or not any(checked):
        raise InputError(f"shares need {experts} numbers from 0 up, not all 0, got {shares}")
    return checked


def sum_of(arrays: Iterable[Array]) -> Array:
    """Add arrays up, one in memory at a time."""
    remaining = iter(arrays)
    total = next(remaining)
    for array in remaining:
        total = total + array
    return total


def tails(xp: Backend, values: Array) -> tuple[float, ...]:
    """Return what the first r eigenvalues leave, for r from 0 on."""
    numbers = [max(0.0, float(value)) for value in xp.to_numpy(values)]
    tails, left = [0.0], 0.0
    for value in reversed(numbers):
        left += value
        tails.append(left)
    return tuple(reversed(tails))
