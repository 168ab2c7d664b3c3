"""The search behind bond selection: fewest parameters for an error, least error for a size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from tnmoe.shapes import MPOShape

# Combinations of ranks looked at in one go; up to here the search is exhaustive. It takes tens of
# milliseconds, and covers five sites of a 3072 × 768 matrix at all ranks.
_MAX_EXHAUSTIVE = 2**17
# The same for one step of the local search, of which there are many.
_MAX_STEP = 2**12
# Ranks per bond, and classes of parameters per rank, in the coarse search that precedes it.
_COARSE_RANKS = 24
_COARSE_CLASSES = 48
# Pairs of bonds that are varied together, at most: all pairs of 24 bonds, near ones of more.
_PAIRS = 24**2

# One rank per bond: integers, or integer arrays that broadcast to many choices at once.
_Ranks: TypeAlias = Sequence[Any]


def choose_bonds(
    tails: Sequence[np.ndarray],
    shape: MPOShape,
    caps: Sequence[int],
    allowed: float | None = None,
    max_params: int | None = None,
) -> tuple[int, ...]:
    """Bonds with the fewest parameters for a squared error, or the least error for a size.

    Parameters
    ----------
    tails : sequence of array
        Per bond: squared weight lost by keeping r Schmidt values (``squared_tails``).
    shape : MPOShape
        What the bonds belong to.
    caps : sequence of int
        Largest rank per bond.
    allowed : float, optional
        Largest sum of tails. Where ``caps`` or ``max_params`` rule it out, the least sum they
        leave takes its place.
    max_params : int, optional
        Largest number of parameters.

    Returns
    -------
    tuple of int
        Ranks of at least 1 that ``shape.bond_dims`` keeps; without ``allowed`` and ``max_params``
        the largest there are.
    """
    chain = _Chain.of(tails, shape, caps)
    return chain.spread(_choose(chain, allowed, max_params))


def _choose(chain: _Chain, allowed: float | None, max_params: int | None) -> tuple[int, ...]:
    if not chain.tails or (allowed is None and max_params is None):
        return chain.caps
    if allowed is not None:
        goal = _FewestParams(chain, max(allowed, chain.error(chain.caps)))
        ranks = _search(goal, goal.start())
        if max_params is None or chain.params(ranks) <= max_params:
            return ranks
    assert max_params is not None
    least = _LeastError(chain, min(max_params, chain.params(chain.caps)))
    ranks = _search(least, least.start())
    # Of the choices with this error, or with the one allowed, the one with the fewest parameters.
    return _search(_FewestParams(chain, max(allowed or 0.0, chain.error(ranks))), ranks)


def _tied(legs: Sequence[int]) -> list[list[int]]:
    """Bonds that have one rank in common: those around inner sites whose leg is 1."""
    groups: list[list[int]] = []
    for bond in range(len(legs) - 1):
        if bond and legs[bond] == 1:
            groups[-1].append(bond)
        else:
            groups.append([bond])
    return groups


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.sum(arrays, axis=0)


@dataclass(frozen=True)
class _Chain:
    """Error, parameters and limits of ranks; ranks may be arrays that broadcast.

    The bonds on both sides of a leg of 1 can only be used at one common rank. They count as one
    here: ``units`` says how many such sites lie within each.
    """

    tails: tuple[np.ndarray, ...]
    legs: tuple[int, ...]
    caps: tuple[int, ...]
    units: tuple[int, ...]

    @classmethod
    def of(cls, tails: Sequence[np.ndarray], shape: MPOShape, caps: Sequence[int]) -> _Chain:
        reachable = [min(cap, len(tail) - 1) for cap, tail in zip(caps, tails, strict=True)]
        usable, groups = shape.bond_dims(reachable), _tied(shape.legs)
        inner = (leg for leg in shape.legs[1:-1] if leg > 1)
        return cls(
            tuple(_sum([tails[bond][: usable[bond] + 1] for bond in group]) for group in groups),
            (shape.legs[0], *inner, *shape.legs[1:][-1:]),
            tuple(usable[group[0]] for group in groups),
            tuple(len(group) - 1 for group in groups),
        )

    def spread(self, ranks: _Ranks) -> tuple[int, ...]:
        """One rank for every bond."""
        pairs = zip(ranks, self.units, strict=True)
        return tuple(rank for rank, units in pairs for _ in range(1 + units))

    def error(self, ranks: _Ranks) -> Any:
        """Predicted squared error; added up from left to right, so that it is reproducible."""
        return sum(tail[rank] for tail, rank in zip(self.tails, ranks, strict=True))

    def params(self, ranks: _Ranks) -> Any:
        padded = (1, *ranks, 1)
        within = sum(
            units * rank**2 for units, rank in zip(self.units, ranks, strict=True) if units
        )
        return within + sum(padded[k] * leg * padded[k + 1] for k, leg in enumerate(self.legs))

    def usable(self, ranks: _Ranks) -> Any:
        """Whether no rank exceeds what its neighbours can use."""
        padded = (1, *ranks, 1)
        usable: Any = True
        for left, leg, right in zip(padded[:-1], self.legs, padded[1:], strict=True):
            usable = usable & (right <= leg * left) & (left <= leg * right)
        return usable

    def range_of(self, bond: int, ranks: _Ranks) -> tuple[Any, Any]:
        """Least and largest rank at one bond beside the ranks of its neighbours.

        Where the neighbours contradict each other, both are the largest.
        """
        padded = (1, *ranks, 1)
        left, right = padded[bond], padded[bond + 2]
        leg_left, leg_right = self.legs[bond], self.legs[bond + 1]
        most = np.minimum(np.minimum(leg_left * left, leg_right * right), self.caps[bond])
        least = np.maximum(-(-left // leg_left), -(-right // leg_right))
        return np.minimum(least, most), most

    def at_common_error(self, error: float) -> tuple[int, ...]:
        """Usable ranks that cut at most ``error`` at every bond, as far as caps permit."""
        needed = [
            1 + int(np.count_nonzero(tail[1:cap] > error))
            for tail, cap in zip(self.tails, self.caps, strict=True)
        ]
        padded = [1, *needed, 1]
        for k, leg in enumerate(self.legs):
            padded[k + 1] = max(padded[k + 1], -(-padded[k] // leg))
        for k, leg in reversed(list(enumerate(self.legs))):
            padded[k] = max(padded[k], -(-padded[k + 1] // leg))
        return tuple(padded[1:-1])

    def common_errors(self) -> np.ndarray:
        """All errors between which :meth:`at_common_error` changes, ascending."""
        return np.unique(np.concatenate(self.tails))


@dataclass(frozen=True)
class _FewestParams:
    """Fewest parameters with a squared error of at most ``allowed``."""

    chain: _Chain
    allowed: float

    def met(self, ranks: _Ranks) -> Any:
        return self.chain.error(ranks) <= self.allowed

    def keys(self, ranks: _Ranks) -> tuple[Any, Any]:
        """What to minimise, and what decides between equals."""
        return self.chain.params(ranks), self.chain.error(ranks)

    def fill(self, ranks: list[Any], bond: int) -> None:
        """Give one bond the best rank beside the others: the least that meets the goal."""
        low, high = self.chain.range_of(bond, ranks)
        # Bisection over the very sum that is compared in the end: ``allowed`` minus the other
        # tails would round differently.
        for _ in range(self.chain.caps[bond].bit_length()):
            ranks[bond] = (low + high) // 2
            met = self.met(ranks)
            low = np.where(met, low, np.minimum(ranks[bond] + 1, high))
            high = np.where(met, ranks[bond], high)
        ranks[bond] = high

    def limits(self, start: tuple[int, ...]) -> tuple[int, float]:
        """Most parameters and error of anything that is no worse than ``start``."""
        return self.chain.params(start), self.allowed

    def start(self) -> tuple[int, ...]:
        """The largest common error that meets the goal."""
        chain, errors = self.chain, self.chain.common_errors()
        first_missed = bisect_left(
            errors, True, key=lambda error: not self.met(chain.at_common_error(error))
        )
        return chain.at_common_error(errors[first_missed - 1])


def _largest(slope: Any, units: int, room: Any) -> Any:
    """The largest r with slope · r + units · r² ≤ room; below 1 where there is none."""
    if not units:
        return room // slope
    root = np.sqrt(np.maximum(0, slope * slope + 4.0 * units * room))
    found = np.floor((root - slope) / (2 * units)).astype(np.int64)
    # Rounding may have missed it by one.
    found += (slope + units * (found + 1)) * (found + 1) <= room
    return found - ((slope + units * found) * found > room)


@dataclass(frozen=True)
class _LeastError:
    """Least squared error with at most ``budget`` parameters."""

    chain: _Chain
    budget: int

    def met(self, ranks: _Ranks) -> Any:
        return self.chain.params(ranks) <= self.budget

    def keys(self, ranks: _Ranks) -> tuple[Any, Any]:
        """What to minimise, and what decides between equals."""
        return self.chain.error(ranks), self.chain.params(ranks)

    def fill(self, ranks: list[Any], bond: int) -> None:
        """Give one bond the best rank beside the others: the largest that meets the goal."""
        low, high = self.chain.range_of(bond, ranks)
        padded = (1, *ranks, 1)
        legs, units = self.chain.legs, self.chain.units[bond]
        slope = padded[bond] * legs[bond] + legs[bond + 1] * padded[bond + 2]
        ranks[bond] = 0
        ranks[bond] = np.clip(
            _largest(slope, units, self.budget - self.chain.params(ranks)), low, high
        )

    def limits(self, start: tuple[int, ...]) -> tuple[int, float]:
        """Most parameters and error of anything that is no worse than ``start``."""
        return self.budget, self.chain.error(start)

    def start(self) -> tuple[int, ...]:
        """The smallest common error that meets the goal."""
        chain, errors = self.chain, self.chain.common_errors()
        first = bisect_left(
            errors, True, key=lambda error: bool(self.met(chain.at_common_error(error)))
        )
        return chain.at_common_error(errors[first])


_Goal: TypeAlias = _FewestParams | _LeastError


def _search(goal: _Goal, start: tuple[int, ...]) -> tuple[int, ...]:
    """Best ranks for a goal: of all where these are few enough, else from a local search.

    It is no worse than ``start``, which has to meet the goal.
    """
    everything = tuple(range(len(start)))
    if prod(goal.chain.caps) // max(goal.chain.caps) <= _MAX_EXHAUSTIVE:
        return _best(goal, start, everything, _MAX_EXHAUSTIVE)
    return min(_improved(goal, start), _improved(goal, _coarse(goal, start)), key=goal.keys)


def _coarse(goal: _Goal, start: tuple[int, ...]) -> tuple[int, ...]:
    """Roughly the best choice, from a dynamic programme over the bonds from left to right.

    It tries some ranks per bond. Of all choices up to a bond that end in the same rank and have
    about the same number of parameters it follows the one with the least error.
    """
    chain = goal.chain
    most_params, most_error = goal.limits(start)
    paths = np.ones((1, 1), dtype=np.int64)
    params, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    for bond, (cap, leg) in enumerate(zip(chain.caps, chain.legs[:-1], strict=True)):
        ranks = _some_ranks(cap, start[bond], _COARSE_RANKS)
        left = paths[:, -1:]
        params = params[:, None] + (left * leg + chain.units[bond] * ranks) * ranks
        error = error[:, None] + chain.tails[bond][ranks]
        least_params = params + ranks * chain.legs[bond + 1] + sum(chain.legs[bond + 2 :])
        fits = (ranks <= leg * left) & (left <= leg * ranks)
        origin, column = np.nonzero(fits & (least_params <= most_params) & (error <= most_error))
        params, error = params[origin, column], error[origin, column]
        alike = column * _COARSE_CLASSES + params * _COARSE_CLASSES // (most_params + 1)
        by_error = np.argsort(error)
        kept = by_error[np.unique(alike[by_error], return_index=True)[1]]
        params, error = params[kept], error[kept]
        paths = np.column_stack([paths[origin[kept]], ranks[column[kept]]])
    choices = [tuple(path) for path in paths[:, 1:].tolist()]
    return min(choices, key=goal.keys, default=start)


def _improved(goal: _Goal, start: tuple[int, ...]) -> tuple[int, ...]:
    """Local search: the best of a few bonds at a time, as long as that helps."""
    best, previous = start, None
    while best != previous:
        previous = best
        for block in _blocks(len(start)):
            best = _best(goal, best, block, _MAX_STEP)
    return best


def _blocks(bonds: int) -> Iterator[tuple[int, ...]]:
    """Bonds that are varied together: neighbours, on whose product parameters depend, and pairs."""
    for size in (4, 3):
        for first in range(bonds - size + 1):
            yield tuple(range(first, first + size))
    farthest = max(1, _PAIRS // bonds)
    for first in range(bonds):
        for second in range(first + 1, min(bonds, first + 1 + farthest)):
            yield first, second


def _best(
    goal: _Goal, start: tuple[int, ...], block: tuple[int, ...], limit: int
) -> tuple[int, ...]:
    """Best choice that differs from ``start`` in the bonds of ``block`` alone.

    The largest bond of the block is not varied: its best rank follows from those of the others.
    """
    chain = goal.chain
    follows = max(block, key=lambda bond: chain.caps[bond])
    varied = [bond for bond in block if bond != follows and chain.caps[bond] > 1]
    ranks: list[Any] = list(start)
    for axis, candidates in enumerate(_candidates(chain.caps, start, varied, limit)):
        ranks[varied[axis]] = candidates.reshape(-1, *(1,) * (len(varied) - axis - 1))
    goal.fill(ranks, follows)
    fits = chain.usable(ranks) & goal.met(ranks)
    first, second = goal.keys(ranks)
    fits, first, second = np.broadcast_arrays(fits, first, second)
    if not fits.any():
        return start
    minimal = fits & (first == first[fits].min())
    index = np.argmin(np.where(minimal, second, np.inf))
    found = tuple(int(np.broadcast_to(rank, fits.shape).flat[index]) for rank in ranks)
    return min(start, found, key=goal.keys)


def _candidates(
    caps: Sequence[int], start: Sequence[int], varied: Sequence[int], limit: int
) -> list[np.ndarray]:
    """Ranks to try at the varied bonds, at most about ``limit`` combinations in all.

    Bonds with few ranks try them all and leave the others more of the limit.
    """
    candidates = {}
    ascending = sorted(varied, key=lambda bond: caps[bond])
    for position, bond in enumerate(ascending):
        count = max(2, int((limit + 0.5) ** (1 / (len(ascending) - position))))
        limit //= min(count, caps[bond])
        candidates[bond] = _some_ranks(caps[bond], start[bond], count)
    return [candidates[bond] for bond in varied]


def _some_ranks(cap: int, center: int, count: int) -> np.ndarray:
    """Up to ``count`` ranks from 1 to ``cap``: all, or half around a centre and half all over."""
    if cap <= count:
        return np.arange(1, cap + 1)
    near = center + np.arange(count // 2) - count // 4
    spread = np.linspace(1, cap, count - len(near)).round().astype(np.int64)
    return np.unique(np.concatenate([near.clip(1, cap), spread]))
