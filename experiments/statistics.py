"""What results of several seeds say: means, spreads, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

Result = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One method minus another on the same seeds.

    Attributes
    ----------
    mean : float
    half_width : float or None
        Of the 95 % interval of Student's t over seeds; none with one seed.
    each : tuple of float
        Seed by seed.
    """

    mean: float
    half_width: float | None
    each: tuple[float, ...]

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval leaves no doubt, else 0."""
        if self.half_width is None or not abs(self.mean) > self.half_width:
            return 0
        return -1 if self.mean < 0 else 1

    def __str__(self) -> str:
        spread = "one seed" if self.half_width is None else f"± {self.half_width:.4f}"
        return f"{self.mean:+.4f} {spread}"


def best_rate(results: Sequence[Result]) -> float | None:
    """Learning rate of the lowest validation loss of one method, None without results.

    Losses are means over the seeds with which all rates were tried.
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
    """A method's results at its learning rate (:func:`best_rate`), by seed."""
    own = [each for each in results if each["method"] == method]
    best = best_rate(own)
    return sorted(
        (each for each in own if each["learning_rate"] == best), key=lambda each: each["seed"]
    )


def values(results: Sequence[Result], method: str, metric: str) -> dict[int, float]:
    """Held-out test results of a method, by seed; infinite where training diverged."""
    return {each["seed"]: _or_infinite(each["test"][metric]) for each in chosen(results, method)}


def difference(
    results: Sequence[Result], method: str, other: str, metric: str
) -> Difference | None:
    """Method minus other, over the seeds that both have; None where there are none."""
    mine, theirs = values(results, method, metric), values(results, other, metric)
    each = tuple(mine[seed] - theirs[seed] for seed in sorted(set(mine) & set(theirs)))
    if not each:
        return None
    width = None
    if len(each) > 1:
        width = float(t.ppf(0.975, len(each) - 1)) * stdev(each) / sqrt(len(each))
    return Difference(fmean(each), width, each)


def mean_and_spread(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation where there are several."""
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else None


def _or_infinite(number: float | None) -> float:
    return float("inf") if number is None else number
