"""From what a caller asks of a truncation to how much is cut at each bond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import gt

import numpy as np

from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape
from tnmoe.truncation.info import check_rtol
from tnmoe.truncation.search import choose_bonds
from tnmoe.truncation.select import check_limits
from tnmoe.truncation.spectra import squared_tails


@dataclass(frozen=True)
class Limits:
    """The bond dimensions a caller asks for, checked against a shape.

    Parameters
    ----------
    shape : MPOShape
        Legs of the operator.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond.
    rtol : float, optional
        Largest relative Frobenius error of the whole.
    max_params : int, optional
        Most numbers that all cores may hold together.

    Raises
    ------
    InputError
        If an argument is out of range, or two of them contradict each other.
    """

    shape: MPOShape
    max_bond: int | Sequence[int] | None = None
    bonds: Sequence[int] | None = None
    rtol: float | None = None
    max_params: int | None = None

    def __post_init__(self) -> None:
        check_limits(self.shape, self.max_bond, self.bonds, self.rtol, self.max_params)
        object.__setattr__(self, "rtol", check_rtol(self.rtol))

    @property
    def caps(self) -> tuple[int, ...]:
        """Largest dimension of every bond."""
        return self.shape.bond_dims(self.max_bond if self.bonds is None else self.bonds)

    @property
    def needs_spectra(self) -> bool:
        """Whether the bonds depend on the Schmidt values."""
        if self.rtol is not None:
            return True
        return self.max_params is not None and self.shape.num_params(self.caps) > self.max_params

    def plan(
        self,
        spectra: Sequence[np.ndarray] | None = None,
        limits: Sequence[int] | None = None,
    ) -> ErrorBudget:
        """Decide from the Schmidt values (batch, D) of all bonds, where they are needed.

        ``limits`` are the bonds that are there, where they may be smaller than what would fit.
        """
        caps = self.caps
        if limits is not None:
            if self.bonds is not None and any(map(gt, self.bonds, limits)):
                raise InputError(
                    f"bonds={tuple(self.bonds)} exceed the bonds that are there: {tuple(limits)}"
                )
            caps = self.shape.bond_dims([min(pair) for pair in zip(caps, limits, strict=True)])
        if not self.needs_spectra or spectra is None or not spectra:
            return ErrorBudget(caps)
        tails = [squared_tails(values) for values in spectra]
        squared_norms = np.max([tail[:, 0] for tail in tails], axis=0)
        # One set of bonds for the whole batch: good enough for its worst matrix at every bond.
        relative = [
            (tail / np.where(squared_norms > 0, squared_norms, 1.0)[:, None]).max(axis=0)
            for tail in tails
        ]
        if self.bonds is not None:
            return self._checked(relative)
        allowed = None if self.rtol is None else self.rtol**2
        ranks = choose_bonds(relative, self.shape, caps, allowed, self.max_params)
        if allowed is None:
            return ErrorBudget(ranks)
        planned = [tail[:, rank] for tail, rank in zip(tails, ranks, strict=True)]
        spare = np.maximum(0.0, allowed * squared_norms - np.sum(planned, axis=0))
        return ErrorBudget(ranks, planned, spare)

    def _checked(self, relative: Sequence[np.ndarray]) -> ErrorBudget:
        ranks = self.caps
        error = sum(float(tail[rank]) for tail, rank in zip(relative, ranks, strict=True)) ** 0.5
        if self.rtol is not None and error > self.rtol:
            raise InputError(
                f"bonds={ranks} may leave a relative error of {error:.3g}, "
                f"more than rtol={self.rtol}"
            )
        return ErrorBudget(ranks)


class ErrorBudget:
    """How many Schmidt values to keep at each bond, decided while the bonds are being cut.

    Parameters
    ----------
    ranks : sequence of int
        Most that is kept, per bond.
    allowed : sequence of array, shape (batch,), optional
        Squared weight that each matrix may lose at each bond. What one bond does not need is
        left to those after it. Without it exactly ``ranks`` values are kept.
    spare : array, shape (batch,), optional
        Squared weight that may be lost on top, wherever it saves something first.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        allowed: Sequence[np.ndarray] | None = None,
        spare: np.ndarray | float = 0.0,
    ) -> None:
        self.ranks = tuple(ranks)
        self.adaptive = allowed is not None
        self._allowed = allowed
        self._spare = spare

    def budget(self, bond: int) -> np.ndarray | None:
        """Squared weight that may be lost at the bond that is cut next; None if that is fixed."""
        return None if self._allowed is None else self._allowed[bond] + self._spare

    def choose(self, bond: int, spectra: np.ndarray, limit: int) -> tuple[int, np.ndarray]:
        """Values to keep of spectra (batch, D), at most ``limit``; the 2-norm each loses."""
        rank = min(self.ranks[bond], limit)
        tails = squared_tails(spectra)
        budget = self.budget(bond)
        if budget is not None:
            fits = np.all(tails <= budget[:, None], axis=0)
            if fits[: rank + 1].any():
                rank = max(1, int(np.argmax(fits)))
            self._spare = np.maximum(0.0, budget - tails[:, rank])
        return rank, np.sqrt(tails[:, rank])
