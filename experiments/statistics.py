"""Statistics over seeds: means, spreads, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

Result = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """The difference of two methods on the same seeds.

    Attributes
    ----------
    mean : float
    half_width : float or None
        Half the width of the 95 % interval of Student's t over seeds; None with one seed, infinite
        if training diverged.
    each : tuple of float
        The differences, seed by seed.
    """

    mean: float
    half_width: float | None
    each: tuple[float, ...]

    @property
    def low(self) -> float:
        """Lower end of the interval; minus infinity with one seed."""
        return -inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity with one seed."""
        return inf if self.half_width is None else self.mean + self.half_width

    def __str__(self) -> str:
        spread = "one seed" if self.half_width is None else f"± {self.half_width:.4f}"
        return f"{self.mean:+.4f} {spread}"


def best_rate(results: Sequence[Result]) -> float | None:
    """Return the learning rate with a method's lowest validation loss; None without results.

    Losses are means over the seeds that tried all rates.
    """
    losses: dict[float, dict[int, float]] = {}
    for each in results:
        loss = _or_infinite(each["validation"]["loss"])
        losses.setdefault(each["learning_rate"], {})[each["seed"]] = loss
    if not losses:
        return None
    common = set.intersection(*(set(by_seed) for by_seed in losses.values()))
    return min(losses, key=lambda rate: fmean(losses[rate][seed] for seed in sorted(common)))


def chosen(results: Sequence[Result], method: str) -> list[Result]:
    """Return a method's results at its :func:`best_rate`, in the order of the seeds."""
    own = [each for each in results if each["method"] == method]
    best = best_rate(own)
    return sorted(
        (each for each in own if each["learning_rate"] == best), key=lambda each: each["seed"]
    )


def values(results: Sequence[Result], method: str, metric: str) -> dict[int, float]:
    """Return a method's held-out test results by seed; infinite where training diverged."""
    return {each["seed"]: _or_infinite(each["test"][metric]) for each in chosen(results, method)}


def difference(
    results: Sequence[Result], method: str, other: str, metric: str
) -> Difference | None:
    """Compute method minus other over their common seeds; None without any."""
    mine, theirs = values(results, method, metric), values(results, other, metric)
    each = tuple(mine[seed] - theirs[seed] for seed in sorted(set(mine) & set(theirs)))
    if not each:
        return None
    return Difference(fmean(each), _half_width(each), each)


def _half_width(numbers: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of Student's t for the mean."""
    count = len(numbers)
    if count < 2:
        return None
    if not all(map(isfinite, numbers)):
        return inf
    return float(t.ppf(0.975, count - 1)) * stdev(numbers) / sqrt(count)


def mean_and_spread(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation of several numbers."""
    if len(numbers) < 2:
        return fmean(numbers), None
    return fmean(numbers), stdev(numbers) if all(map(isfinite, numbers)) else inf


def _or_infinite(number: float | None) -> float:
    return inf if number is None else number
