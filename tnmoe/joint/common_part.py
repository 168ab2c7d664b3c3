"""A matrix that many matrices have in common, and low ranks for what remains of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tnmoe.backends import Array, get_backend
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import computable, widened
from tnmoe.joint.basis import checked_shares, tails
from tnmoe.joint.decompose_shared import decompose_shared
from tnmoe.joint.whitening import Whitening
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO


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
    >>> shared = common_part(matrices).decompose(matrices, 1)
    >>> bool(np.allclose(shared.to_matrices(), matrices, atol=1e-4))
    True
    """

    squared_errors: tuple[float, ...]
    _importance: tuple[float, ...] = field(repr=False)
    _whitening: Whitening | None = field(repr=False)

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
        xp = get_backend(matrices)
        work, name = computable(xp, matrices), xp.dtype_name(matrices)
        if self._whitening is not None:
            root = xp.astype(self._whitening.root, xp.dtype_name(work))
            work = work @ root
        shared = decompose_shared(
            work, residual=True, bonds=[size], importance=self._importance, max_sweeps=_TURNS
        )
        assert shared.base is not None
        base, (left, right) = shared.base.cores[0][0, :, :, 0], shared.cores
        if self._whitening is not None:
            inverse = xp.astype(self._whitening.inverse, xp.dtype_name(work))
            base = base @ inverse
            right = (right[:, :, 0, :, 0] @ inverse)[:, :, None, :, None]
        whole = MPOShape((base.shape[0],), (base.shape[1],))
        common = MPO([xp.astype(base, name)[None, :, :, None]], whole)
        cores = [xp.astype(left, name), xp.astype(right, name)]
        return SharedMPO(cores, shared.shape, shared.center_site, base=common)


# Turns between the common matrix and the low ranks.
_TURNS = 8


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
    xp, work = get_backend(matrices), computable(get_backend(matrices), matrices)
    checked = checked_shares(shares, matrices.shape[0])
    total = sum(checked)
    with xp.full_precision(work):
        whitening = None if moments is None else Whitening.of(xp, moments, matrices.shape[2])
        mean, importance, squares = None, [], None
        for share, matrix in zip(checked, work, strict=True):
            part = widened(xp, matrix) * (share / total)
            mean = part if mean is None else mean + part
        for share, matrix in zip(checked, work, strict=True):
            wide, rest = widened(xp, matrix), widened(xp, matrix) - mean
            if whitening is not None:
                wide, rest = wide @ whitening.root, rest @ whitening.root
            importance.append(share * number_of(xp, xp.norm(wide)) ** 2)
            if rest.shape[0] > rest.shape[1]:
                rest = xp.adjoint(rest)
            values = xp.eigvalsh(rest @ xp.adjoint(rest)) * share
            squares = values if squares is None else squares + values
        return CommonPart(tails(xp, squares), tuple(importance), whitening)
