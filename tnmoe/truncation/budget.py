"""The error that each bond may make while the bonds of a chain are cut one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnmoe.truncation.spectra import squared_tails


class ErrorBudget:
    """How many Schmidt values to keep at each bond, decided while the bonds are being cut.

    Parameters
    ----------
    ranks : sequence of int
        Largest number of values to keep, per bond.
    allowed : sequence of array, shape (batch,), optional
        Per bond: the squared error that each matrix may make there. What a bond does not use is
        left to the bonds after it. Without it exactly ``ranks`` values are kept.
    spare : array, shape (batch,), optional
        Squared error on top, for the first bonds where it saves something.
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

    def allowed_error(self, bond: int) -> np.ndarray | None:
        """Return the squared error (batch,) allowed at the next bond; None if its rank is fixed."""
        return None if self._allowed is None else self._allowed[bond] + self._spare

    def choose(self, bond: int, spectra: np.ndarray, limit: int) -> tuple[int, np.ndarray]:
        """Choose how many values to keep at the next bond, and take the loss off the budget.

        Parameters
        ----------
        bond : int
            Bonds are to be cut in one order, each once.
        spectra : array, shape (batch, D)
            Schmidt values of each matrix, descending.
        limit : int
            Largest number that can be kept.

        Returns
        -------
        int
            Number of values to keep.
        array, shape (batch,)
            2-norm of the values that each matrix loses.
        """
        rank = min(self.ranks[bond], limit)
        tails = squared_tails(spectra)
        allowed = self.allowed_error(bond)
        if allowed is not None:
            fits = np.all(tails <= allowed[:, None], axis=0)
            if fits[: rank + 1].any():
                rank = max(1, int(np.argmax(fits)))
            self._spare = np.maximum(0.0, allowed - tails[:, rank])
        return rank, np.sqrt(tails[:, rank])
