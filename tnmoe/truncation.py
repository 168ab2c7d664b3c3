"""Choosing bond dimensions from Schmidt spectra, and what a choice discards."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot, isfinite, sqrt

import numpy as np

from tnmoe.backends import Array
from tnmoe.errors import InputError


@dataclass(frozen=True)
class TruncationInfo:
    """What a truncation saw and cut, bond by bond.

    Attributes
    ----------
    discarded : tuple of float
        Per bond: 2-norm of the Schmidt values cut there.
    spectra : tuple of array
        Per bond: the Schmidt values seen when the bond was cut, descending, before cutting.
    methods : tuple of str
        Per bond: the algorithm used (``"eigh"`` or ``"svd"``).
    """

    discarded: tuple[float, ...]
    spectra: tuple[Array, ...] = field(repr=False)
    methods: tuple[str, ...]

    @property
    def error_bound(self) -> float:
        """Bound on ‖W − MPO‖ in the Frobenius norm, absolute: sqrt(Σ discarded²).

        Every cut is an orthogonal projection inside the range of the ones before it, so the
        errors add up as squares (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2).
        The bound is reached, except where the shape is padded: what was cut may lie in the
        padding. Rounding comes on top: a few units in the last place of ‖W‖.
        """
        return hypot(*self.discarded)


class ErrorBudget:
    """A relative error to spend over the bonds, evenly over those that are still to be cut.

    Parameters
    ----------
    rtol : float or None
        Largest relative Frobenius error of the whole; None allows none.
    norm : float
        Frobenius norm of what is decomposed.
    bonds : int
        Number of bonds that will be cut.
    """

    def __init__(self, rtol: float | None, norm: float, bonds: int) -> None:
        self._remaining = 0.0 if rtol is None else (rtol * norm) ** 2
        self._bonds = bonds
        self._cuts_zeros = rtol is not None

    def choose_rank(self, spectrum: np.ndarray, cap: int) -> tuple[int, float]:
        """Rank to keep of a descending spectrum, and the 2-norm of what that cuts.

        What an earlier bond did not need is left for the later ones. ``cap`` wins over the
        budget: a bond dimension the caller asked for is never exceeded.
        """
        squares = np.asarray(spectrum, dtype=np.float64) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        rank = len(squares)
        if self._cuts_zeros:
            fitting = np.nonzero(tails <= self._remaining / self._bonds)[0]
            rank = max(1, int(fitting[0]))
        rank = min(rank, cap)
        self._remaining = max(0.0, self._remaining - tails[rank])
        self._bonds -= 1
        return rank, sqrt(tails[rank])


def check_rtol(rtol: float | None) -> None:
    """Raise an InputError unless ``rtol`` is None or a finite number of at least 0."""
    if rtol is None:
        return
    if not isinstance(rtol, (int, float, np.floating)) or not isfinite(rtol) or rtol < 0:
        raise InputError(f"rtol must be a finite number of at least 0, got {rtol!r}")
