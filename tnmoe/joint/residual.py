"""Low ranks for many matrices at once, beside a matrix that they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import computable, narrowed
from tnmoe.joint.basis import checked_shares, sum_of, tails, weighed
from tnmoe.joint.decompose_shared import decompose_shared
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.row_weights import checked_rows, roots_of_rows
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO

# Turns between the common matrix and the low ranks.
_TURNS = 8


@dataclass(frozen=True)
class Residual:
    """Matrices written as W_e ≈ B + L_e · R_e, for every rank.

    Attributes
    ----------
    squared_errors : tuple of float
        With rank r, for r from 0 on: Σ_e share_e · ‖D^½ (W_e − Ŵ_e) S^½‖². These are the errors of
        the mean as B; :meth:`decompose` finds a better one.
    squared_norm : float
        Σ_e share_e · ‖D^½ W_e S^½‖², to which errors are relative.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> own = rng.normal(size=(3, 6, 1)) * rng.normal(size=(3, 1, 5))
    >>> matrices = rng.normal(size=(6, 5)) + own
    >>> part = residual(matrices)
    >>> shared = part.decompose(matrices, 1)
    >>> error = np.linalg.norm(shared.to_matrices() - matrices)
    >>> bool(error**2 <= part.squared_errors[1])
    True
    """

    squared_errors: tuple[float, ...]
    squared_norm: float
    _importance: tuple[float, ...] = field(repr=False)
    _moments: InputMoments | None = field(repr=False)
    # D^½, (out,).
    _rows: np.ndarray | None = field(repr=False)

    def num_params(self, matrices: Array, size: int) -> int:
        """Count the parameters of :meth:`decompose`'s result."""
        count, rows, columns = matrices.shape
        return rows * columns + count * size * (rows + columns)

    def decompose(self, matrices: Array, size: int) -> SharedMPO:
        """Find the low ranks by turns with the common matrix.

        Parameters
        ----------
        matrices : array, shape (E, out, in)
            The matrices that this was made of.
        size : int
            Rank r, the bond dimension.

        Returns
        -------
        SharedMPO
            Of two sites with the legs (out | in).
        """
        xp = get_backend(matrices)
        _, rows, columns = matrices.shape
        found = decompose_shared(
            matrices if self._rows is None else _scaled(xp, computable(xp, matrices), self._rows),
            MPOShape((rows, 1), (1, columns)),
            shared_sites="none",
            residual=True,
            bonds=[size],
            weights=None if self._moments is None else self._moments.of_expert(),
            damping=0.0,
            importance=self._importance,
            max_sweeps=_TURNS,
        )
        if self._rows is None:
            return found
        return _with_rows(xp, found, 1 / self._rows, xp.dtype_name(matrices))


def residual(
    matrices: Array,
    *,
    shares: Sequence[float] | None = None,
    moments: InputMoments | None = None,
    rows: Array | None = None,
) -> Residual:
    """Prepare a common matrix with low ranks; minimise Σ_e share_e ‖D^½ (W_e − Ŵ_e) S^½‖².

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    moments : InputMoments, optional
        Second moments S of the inputs, which all experts have in common; by default the identity.
    rows : array, shape (E, out) or (out,), optional
        Weights of output rows, from 0 up; by default all count 1. Their mean over the experts,
        each with its share, is the diagonal of D for all of them: an approximation where experts
        differ. A row counts 1e-12 of the largest weight at least.

    Returns
    -------
    Residual

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    The form is that of D²-MoE (Gu et al., arXiv:2502.17298).
    """
    xp = get_backend(matrices)
    checked = checked_shares(shares, matrices.shape[0])
    if moments is not None:
        moments.check(matrices, common=True)
    roots = None
    if rows is not None:
        roots = roots_of_rows(np.average(checked_rows(rows, matrices), axis=0, weights=checked))
    every = None if roots is None else np.tile(roots, (len(checked), 1))
    total = sum(checked)
    root = None if moments is None else moments.root()[0]
    with xp.full_precision(computable(xp, matrices)):
        pairs = zip(checked, weighed(xp, matrices, every), strict=True)
        mean = sum_of(matrix * (share / total) for share, matrix in pairs)
        importance, squares = [], []
        for share, whole in zip(checked, weighed(xp, matrices, every), strict=True):
            rest = whole - mean
            if root is not None:
                root = xp.astype(root, xp.dtype_name(whole))
                whole, rest = whole @ root, rest @ root
            importance.append(share * number_of(xp, xp.norm(whole)) ** 2)
            if rest.shape[0] > rest.shape[1]:
                rest = xp.adjoint(rest)
            squares.append(xp.eigvalsh(rest @ xp.adjoint(rest)) * share)
    # All experts count alike where none counts.
    counted = tuple(importance) if any(importance) else (1.0,) * len(importance)
    return Residual(tails(xp, sum_of(squares)), sum(importance), counted, moments, roots)


def _scaled(xp: Backend, matrices: Array, rows: np.ndarray) -> Array:
    """Multiply the rows of matrices (..., out, in) by numbers (out,)."""
    return matrices * xp.from_numpy(rows, like=matrices)[:, None]


def _with_rows(xp: Backend, shared: SharedMPO, rows: np.ndarray, dtype: str) -> SharedMPO:
    """Multiply the rows of all matrices, of two sites (out | in), by numbers; give them a dtype."""
    assert shared.base is not None
    legs = xp.from_numpy(rows, like=shared.cores[0])[:, None, None]
    first, *others = shared.cores
    cores = narrowed(xp, [first * legs, *others], dtype)
    first, *others = shared.base.cores
    base = MPO(narrowed(xp, [first * legs, *others], dtype), shared.base.shape)
    return SharedMPO(cores, shared.shape, shared.center_site, base)
