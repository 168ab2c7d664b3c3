"""Dimension squeezing: bonds shrink one after the other as long as a model's score permits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import floor, isfinite

import numpy as np

from tnmoe.backends import get_backend
from tnmoe.errors import InputError, check_int_from_zero, check_number_in, check_positive_int
from tnmoe.mpo import MPO
from tnmoe.truncation.spectra import squared_tails


@dataclass(frozen=True)
class SqueezeStep:
    """One shrinking of a bond.

    Attributes
    ----------
    name : str
        Name of the operator.
    bond : int
        Number of the bond.
    before, after : int
        Dimension of the bond.
    error : float
        Relative Frobenius error of this step, on this operator.
    score : float
        Score of all operators after this step.

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
    """The operators that squeezing ended with, and its steps.

    Attributes
    ----------
    mpos : dict of str to MPO
        Operators after the last step whose score was not below the threshold.
    score : float
        Their score.
    steps : tuple of SqueezeStep
        Steps up to there, in order.

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
    """Shrink bonds, the one of least error first, until the score falls below a threshold.

    Parameters
    ----------
    mpos : mapping of str to MPO
        The matrices of a model, by name.
    score : callable
        Score of a dict of operators, such as held-out accuracy; larger is better. The callable may
        first fine-tune the model that it builds from them, as the paper does.
    threshold : float
        Least score to accept.
    factor : float
        A bond D shrinks to floor(factor · D), but by 1 at least.
    min_bond : int
        No bond shrinks below this.
    max_steps : int, optional
        Largest number of steps.

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
    Dimension squeezing of MPOP (Liu et al., ACL 2021, arXiv:2106.02205, section 4.2). The Schmidt
    values give the error of every possible step, without building a matrix.

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
    factor = check_number_in("factor", factor, "(0, 1)")
    threshold = check_number_in("threshold", threshold, "(-inf, inf)")
    max_steps = None if max_steps is None else check_int_from_zero("max_steps", max_steps)
    min_bond = check_positive_int("min_bond", min_bond)
    current = {name: mpo.compress() for name, mpo in mpos.items()}
    best = _finite_score(score, current)
    if best < threshold:
        raise InputError(f"the operators score {best} from the start, below threshold={threshold}")
    possible = {name: _possible_steps(name, mpo, factor, min_bond) for name, mpo in current.items()}
    steps: list[SqueezeStep] = []
    while max_steps is None or len(steps) < max_steps:
        cheapest = min(chain.from_iterable(possible.values()), default=None)
        if cheapest is None:
            break
        error, name, bond, after = cheapest
        bonds = list(current[name].bond_dims)
        before, bonds[bond] = bonds[bond], after
        smaller = current | {name: current[name].compress(max_bond=bonds)}
        new_score = _finite_score(score, smaller)
        if new_score < threshold:
            break
        current, best = smaller, new_score
        possible[name] = _possible_steps(name, current[name], factor, min_bond)
        steps.append(SqueezeStep(name, bond, before, after, error, new_score))
    return SqueezeResult(current, best, tuple(steps))


def _possible_steps(
    name: str, mpo: MPO, factor: float, min_bond: int
) -> list[tuple[float, str, int, int]]:
    """List the possible steps: (relative error, name, bond, its new dimension)."""
    steps = []
    # One pass over the chain finds the Schmidt values of all bonds.
    _, info = mpo.compress(return_info=True)
    for bond, (dim, values) in enumerate(zip(mpo.bond_dims, info.spectra, strict=True)):
        after = max(min_bond, min(dim - 1, floor(factor * dim)))
        if after >= dim:
            continue
        spectrum = get_backend(values).to_numpy(values)
        with np.errstate(under="ignore"):
            tails = squared_tails(spectrum / (spectrum[0] or 1.0))
        error = float(np.sqrt(tails[after] / tails[0])) if tails[0] else 0.0
        steps.append((error, name, bond, after))
    return steps


def _finite_score(score: Callable[[dict[str, MPO]], float], mpos: dict[str, MPO]) -> float:
    value = float(score(dict(mpos)))
    if not isfinite(value):
        raise InputError(f"score must return a finite number, got {value}")
    return value
