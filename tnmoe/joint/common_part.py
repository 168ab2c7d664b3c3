"""A matrix that many matrices have in common, and low ranks for what remains of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tnmoe.backends import Array, get_backend
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import computable, widened
from tnmoe.chains.whitening import root_of
from tnmoe.errors import InputError
from tnmoe.joint.basis import checked_shares, sum_of, tails
from tnmoe.joint.decompose_shared import decompose_shared
from tnmoe.shared_mpo import SharedMPO

# Turns between the common matrix and the low ranks.
_TURNS = 8


@dataclass(frozen=True)
class CommonPart:
    """Matrices written as W_e ≈ B + L_e · R_e, for every rank.

    Attributes
    ----------
    squared_errors : tuple of float
        With rank r, for r from 0 on, and the mean as B: Σ_e share_e ‖(W_e − Ŵ_e) S^½‖². Other
        matrices B are better.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> own = rng.normal(size=(3, 6, 1)) * rng.normal(size=(3, 1, 5))
    >>> matrices = rng.normal(size=(6, 5)) + own
    >>> part = common_part(matrices)
    >>> shared = part.decompose(matrices, 1)
    >>> error = np.linalg.norm(shared.to_matrices() - matrices)
    >>> bool(error**2 <= part.squared_errors[1])
    True
    """

    squared_errors: tuple[float, ...]
    _importance: tuple[float, ...] = field(repr=False)
    _moments: Array | None = field(repr=False)

    def num_params(self, matrices: Array, size: int) -> int:
        """Count the parameters of :meth:`decompose`'s result."""
        count, rows, columns = matrices.shape
        return rows * columns + count * size * (rows + columns)

    def decompose(self, matrices: Array, size: int) -> SharedMPO:
        """Find the common matrix and the low ranks by turns.

        Parameters
        ----------
        matrices : array, shape (E, out, in)
            The matrices that this was made of.
        size : int
            Rank r, the bond dimension.

        Returns
        -------
        SharedMPO
            Of two sites with the legs (out | in), and a base.
        """
        return decompose_shared(
            matrices,
            residual=True,
            bonds=[size],
            weights=self._moments,
            damping=0.0,
            importance=self._importance,
            max_sweeps=_TURNS,
        )


def common_part(
    matrices: Array, *, shares: Sequence[float] | None = None, moments: Array | None = None
) -> CommonPart:
    """Prepare matrices to be written as B + L_e · R_e such that Σ_e share_e ‖(…) S^½‖² is small.

    Parameters
    ----------
    matrices : array, shape (E, out, in)
        NumPy array or torch tensor.
    shares : sequence of float, optional
        How much every expert counts; by default all count 1.
    moments : array, shape (in, in), optional
        Second moments S of the inputs, positive definite; by default the identity.

    Returns
    -------
    CommonPart

    Raises
    ------
    InputError
        If an argument does not fit the matrices.

    Notes
    -----
    The form is that of D²-MoE (Gu et al., arXiv:2502.17298).
    """
    xp, size = get_backend(matrices), matrices.shape[2]
    checked = checked_shares(shares, matrices.shape[0])
    total = sum(checked)
    if moments is not None and tuple(moments.shape) != (size, size):
        raise InputError(f"moments must have shape {(size, size)}, got {tuple(moments.shape)}")
    with xp.full_precision(computable(xp, matrices)):
        root = None if moments is None else root_of(xp, widened(xp, moments)[None])[0][0]
        mean = sum_of(
            widened(xp, matrix) * (share / total)
            for share, matrix in zip(checked, matrices, strict=True)
        )
        importance, squares = [], []
        for share, matrix in zip(checked, matrices, strict=True):
            whole, rest = widened(xp, matrix), widened(xp, matrix) - mean
            if root is not None:
                whole, rest = whole @ root, rest @ root
            importance.append(share * number_of(xp, xp.norm(whole)) ** 2)
            if rest.shape[0] > rest.shape[1]:
                rest = xp.adjoint(rest)
            squares.append(xp.eigvalsh(rest @ xp.adjoint(rest)) * share)
        return CommonPart(tails(xp, sum_of(squares)), tuple(importance), moments)
