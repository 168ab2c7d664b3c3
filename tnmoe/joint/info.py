"""What a joint decomposition reports."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, inf


@dataclass(frozen=True)
class SharedInfo:
    """What a joint decomposition lost, expert by expert.

    Attributes
    ----------
    errors : tuple of float
        ‖W_e − chain_e‖ of every expert in the Frobenius norm. They are measured in double
        precision on the result.
    error_bounds : tuple of float
        Bound on every expert's error: the measured one plus the rounding of the measurement.
    norms : tuple of float
        ‖W_e‖ of every expert.
    history : tuple of float
        The root mean square of the experts' relative errors, weighted by their importances: at the
        start and after every sweep of alternating least squares, or after every change of the
        base. It never grows. It is empty where a single decomposition finds the cores.
    weighted_errors : tuple of float, or None
        With ``weights``: every expert's error, weighed by the damped moments, relative to its
        matrix.
    converged : bool
        Whether the last sweep changed the history's number by less than the tolerance.
    start : str
        What the sweeps started from.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, decompose_shared
    >>> matrices = np.random.default_rng(0).normal(size=(3, 8, 8))
    >>> shape = MPOShape((2, 2, 2), (2, 2, 2))
    >>> shared, info = decompose_shared(matrices, shape, max_bond=4, return_info=True)
    >>> true = np.linalg.norm(matrices - shared.to_matrices(), axis=(1, 2))
    >>> bool((true <= info.error_bounds).all())
    True
    """

    errors: tuple[float, ...]
    error_bounds: tuple[float, ...]
    norms: tuple[float, ...]
    history: tuple[float, ...]
    weighted_errors: tuple[float, ...] | None
    converged: bool
    start: str

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Every expert's error relative to its norm; 0 for zeros that are zeros still."""
        return tuple(map(relative, self.errors, self.norms))

    @property
    def limited_errors(self) -> tuple[float, ...]:
        """The errors that ``rtol`` limits: the weighted ones where there are weights."""
        return self.relative_errors if self.weighted_errors is None else self.weighted_errors

    @property
    def error_bound(self) -> float:
        """Bound on the error of all experts together, sqrt(Σ ‖W_e − chain_e‖²)."""
        return hypot(*self.error_bounds)

    def __repr__(self) -> str:
        kind = "relative" if self.weighted_errors is None else "weighted"
        return (
            f"SharedInfo(experts={len(self.errors)}, "
            f"largest_{kind}_error={max(self.limited_errors):.3g}, "
            f"converged={self.converged}, start={self.start!r})"
        )


def relative(error: float, norm: float) -> float:
    """Divide an error by a norm; an error beside zeros is infinite."""
    return error / norm if norm else inf if error else 0.0
