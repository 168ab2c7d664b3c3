"""Low ranks for many matrices at once, beside a matrix that they have in common or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tnmoe.backends import Array, get_backend
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import computable, precise
from tnmoe.joint.basis import checked_shares, sum_of, tails
from tnmoe.joint.decompose_shared import decompose_shared
from tnmoe.joint.input_moments import InputMoments
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO

# Turns between the common matrix and the low ranks.
_TURNS = 8


@dataclass(frozen=True)
class LowRank:
    """Matrices written as W_e ≈ L_e · R_e, or as W_e ≈ B + L_e · R_e, for every rank.

    Attributes
    ----------
    base : bool
        Whether there is a common matrix B.
    squared_errors : tuple of float
        With rank r, for r from 0 on: Σ_e share_e ‖(W_e − Ŵ_e) S^½‖². With a base these are the
        errors of the mean as B; :meth:`decompose` finds a better one.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> own = rng.normal(size=(3, 6, 1)) * rng.normal(size=(3, 1, 5))
    >>> matrices = rng.normal(size=(6, 5)) + own
    >>> part = low_rank(matrices, base=True)
    >>> shared = part.decompose(matrices, 1)
    >>> error = np.linalg.norm(shared.to_matrices() - matrices)
    >>> bool(error**2 <= part.squared_errors[1])
    True
    """

    base: bool
    squared_errors: tuple[float, ...]
    _importance: tuple[float, ...] = field(repr=False)
    _moments: InputMoments | None = field(repr=False)

    def num_params(self, matrices: Array, size: int) -> int:
        """Count the parameters of :meth:`decompose`'s result."""
        count, rows, columns = matrices.shape
        return int(self.base) * rows * columns + count * size * (rows + columns)

    def decompose(self, matrices: Array, size: int) -> SharedMPO:
        """Find the low ranks; with a base by turns with it.

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
        _, rows, columns = matrices.shape
        return decompose_shared(
            matrices,
            MPOShape((rows, 1), (1, columns)),
            shared_sites="none",
            residual=self.base,
            bonds=[size],
            weights=None if self._moments is None else self._moments.matrix,
            damping=0.0,
            importance=self._importance if self.base else None,
            max_sweeps=_TURNS,
        )


def low_rank(
    matrices: Array,
    *,
    base: bool,
    shares: Sequence[float] | None = None,
    moments: InputMoments | None = None,
) -> LowRank:
    """Prepare matrices to be written with low ranks; minimise Σ_e share_e ‖(W_e − Ŵ_e) S^½‖².

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    base : bool
        Whether a matrix that all have in common stands beside the low ranks.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    moments : InputMoments, optional
        Second moments S of the inputs; by default the identity.

    Returns
    -------
    LowRank

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    Without a base this is the truncated SVD of every W_e·R with S = R·Rᴴ. With one, the form is
    that of D²-MoE (Gu et al., arXiv:2502.17298).
    """
    xp = get_backend(matrices)
    checked = checked_shares(shares, matrices.shape[0])
    if moments is not None:
        moments.check(matrices)
    pairs = list(zip(checked, matrices, strict=True))
    total = sum(checked)
    with xp.full_precision(computable(xp, matrices)):
        mean = sum_of(precise(xp, matrix) * (share / total) for share, matrix in pairs)
        importance, squares = [], []
        for share, matrix in pairs:
            whole = precise(xp, matrix)
            rest = whole - mean if base else whole
            if moments is not None:
                root = xp.astype(moments.root, xp.dtype_name(whole))
                whole, rest = whole @ root, rest @ root
            importance.append(share * number_of(xp, xp.norm(whole)) ** 2)
            if rest.shape[0] > rest.shape[1]:
                rest = xp.adjoint(rest)
            squares.append(xp.eigvalsh(rest @ xp.adjoint(rest)) * share)
    # All experts count alike where none counts.
    counted = tuple(importance) if any(importance) else (1.0,) * len(importance)
    return LowRank(base, tails(xp, sum_of(squares)), counted, moments)
