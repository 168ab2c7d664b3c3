"""Dimension squeezing: bonds shrunk one after the other for as long as a model stands it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor, isfinite

import numpy as np

from tnmoe.backends import get_backend
from tnmoe.errors import InputError, integer_from_zero, number_in, positive_int
from tnmoe.mpo import MPO
from tnmoe.truncation.spectra import squared_tails


@dataclass(frozen=True)
class SqueezeStep:
    """One bond that was shrunk.

    Attributes
    ----------
    name : str
        Of the operator.
    bond : int
        Which of its bonds.
    before, after : int
        Its dimension.
    error : float
        Relative Frobenius error of this step, on this operator.
    score : float
        Of all operators after it.

    Examples
    --------
    >>> step = SqueezeStep("up", bond=1, before=16, after=14, error=0.01, score=0.93)
    >>> f"{step.name}: bond {step.bond} from {step.before} to {step.after}"
    'up: bond 1 from 16 to 14'
    """

    name: str
    bond: int
    before: int
    after: int
    error: float
    score: float


@dataclass(frozen=True)
class SqueezeResult:
    """What squeezing arrived at.

    Attributes
    ----------
    mpos : dict of str to MPO
        The operators after the last step whose score was not below the threshold.
    score : float
        Their score.
    steps : tuple of SqueezeStep
        Steps that were kept, in order.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=4, rng=0)
    >>> result = squeeze({"up": mpo}, lambda mpos: 1.0, threshold=0.5, max_steps=2)
    >>> [(step.bond, step.before, step.after) for step in result.steps]
    [(1, 4, 3), (0, 4, 3)]
    """

    mpos: dict[str, MPO]
    score: float
    steps: tuple[SqueezeStep, ...]

    def __repr__(self) -> str:
        bonds = ", ".join(f"{name!r}: {mpo.bond_dims}" for name, mpo in self.mpos.items())
        return f"SqueezeResult(score={self.score:.6g}, steps={len(self.steps)}, bonds={{{bonds}}})"


def squeeze(
    mpos: Mapping[str, MPO],
    score: Callable[[dict[str, MPO]], float],
    threshold: float,
    *,
    factor: float = 0.9,
    min_bond: int = 1,
    max_steps: int | None = None,
) -> SqueezeResult:
    """Shrink bonds, always the one that costs least, until the score falls below a threshold.

    Parameters
    ----------
    mpos : mapping of str to MPO
        The matrices of a model, by name.
    score : callable
        Scores a dict of operators, larger being better: held-out accuracy, say. It may fine-tune
        the model it builds from them first, as the source does.
    threshold : float
        Least score to accept.
    factor : float
        A bond D shrinks to floor(factor · D), and at least by 1.
    min_bond : int
        No bond shrinks below this.
    max_steps : int, optional
        Most steps to take.

    Returns
    -------
    SqueezeResult

    Raises
    ------
    InputError
        If an argument is out of range, the score is not a finite number, or the operators score
        below the threshold from the start.

    Notes
    -----
    Dimension squeezing of MPOP (Liu et al., ACL 2021, arXiv:2106.02205, section 4.2): the error
    that each shrinking would make is read off the Schmidt values, without building a matrix.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpos = {"w": MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=4, rng=0)}
    >>> whole = float(mpos["w"].norm())
    >>> def kept_norm(mpos):
    ...     return float(mpos["w"].norm()) / whole
    >>> result = squeeze(mpos, kept_norm, threshold=0.9)
    >>> result.score >= 0.9, result.mpos["w"].num_params < mpos["w"].num_params
    (True, True)
    """
    factor = number_in("factor", factor, "(0, 1)")
    threshold = number_in("threshold", threshold, "(-inf, inf)")
    max_steps = None if max_steps is None else integer_from_zero("max_steps", max_steps)
    min_bond = positive_int("min_bond", min_bond)
    current = {name: mpo.compress() for name, mpo in mpos.items()}
    best = _scored(score, current)
    if best < threshold:
        raise InputError(f"the operators score {best} from the start, below threshold={threshold}")
    costs = {name: _costs(name, mpo, factor, min_bond) for name, mpo in current.items()}
    steps: list[SqueezeStep] = []
    while max_steps is None or len(steps) < max_steps:
        candidates = [cost for costs_of_one in costs.values() for cost in costs_of_one]
        if not candidates:
            break
        error, name, bond, after = min(candidates)
        bonds = list(current[name].bond_dims)
        before, bonds[bond] = bonds[bond], after
        smaller = current | {name: current[name].compress(max_bond=bonds)}
        reached = _scored(score, smaller)
        if reached < threshold:
            break
        current, best = smaller, reached
        costs[name] = _costs(name, current[name], factor, min_bond)
        steps.append(SqueezeStep(name, bond, before, after, error, reached))
    return SqueezeResult(current, best, tuple(steps))


def _costs(name: str, mpo: MPO, factor: float, min_bond: int) -> list[tuple[float, str, int, int]]:
    """What shrinking each bond would cost: (relative error, name, bond, its new dimension)."""
    costs = []
    # The Schmidt values of all bonds from one pass over the chain.
    _, info = mpo.compress(return_info=True)
    for bond, (dim, values) in enumerate(zip(mpo.bond_dims, info.spectra, strict=True)):
        after = max(min_bond, min(dim - 1, floor(factor * dim)))
        if after >= dim:
            continue
        spectrum = get_backend(values).to_numpy(values)
        with np.errstate(under="ignore"):
            tails = squared_tails(spectrum / (spectrum[0] or 1.0))
        error = float(np.sqrt(tails[after] / tails[0])) if tails[0] else 0.0
        costs.append((error, name, bond, after))
    return costs


def _scored(score: Callable[[dict[str, MPO]], float], mpos: dict[str, MPO]) -> float:
    value = float(score(dict(mpos)))
    if not isfinite(value):
        raise InputError(f"score must return a finite number, got {value}")
    return value
