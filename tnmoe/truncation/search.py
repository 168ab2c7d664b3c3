"""The search behind bond selection: fewest parameters for an error, least error for a size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from tnmoe.shapes import MPOShape

# Up to this many combinations of ranks the search is exhaustive. That takes tens of milliseconds,
# and covers five sites of a 3072 × 768 matrix at all ranks.
_MAX_EXHAUSTIVE = 2**17
# Combinations of one step of the local search, which takes many steps.
_MAX_STEP = 2**12
# Ranks per bond, and classes of parameters per rank, in the coarse search before it.
_COARSE_RANKS = 24
_COARSE_CLASSES = 48
# Largest number of pairs of bonds that are varied together: all pairs of 24 bonds; of more bonds,
# pairs that lie near each other.
_MAX_PAIRS = 24**2

# One rank per bond: integers, or integer arrays that broadcast to many choices at once.
_Ranks: TypeAlias = Sequence[Any]


def choose_bonds(
    tails: Sequence[np.ndarray],
    shape: MPOShape,
    caps: Sequence[int],
    allowed: float | None = None,
    max_params: int | None = None,
) -> tuple[int, ...]:
    """Choose the bonds with the fewest parameters for a squared error, or the least error.

    Parameters
    ----------
    tails : sequence of array
        Per bond: squared error of keeping r Schmidt values (``squared_tails``).
    shape : MPOShape
        Legs of the operator.
    caps : sequence of int
        Largest rank per bond.
    allowed : float, optional
        Largest sum of tails. Where ``caps`` or ``max_params`` rule it out, the least sum that they
        leave takes its place.
    max_params : int, optional
        Largest number of parameters.

    Returns
    -------
    tuple of int
        Ranks of at least 1 that ``shape.bond_dims`` keeps. Without ``allowed`` and ``max_params``
        the largest possible ones.
    """
    chain = _Chain.of(tails, shape, caps)
    return chain.rank_of_every_bond(_choose(chain, allowed, max_params))


def _choose(chain: _Chain, allowed: float | None, max_params: int | None) -> tuple[int, ...]:
    if not chain.tails or (allowed is None and max_params is None):
        return chain.caps
    if allowed is not None:
        goal = _FewestParams(chain, max(allowed, chain.error(chain.caps)))
        ranks = _search(goal, goal.initial_ranks())
        if max_params is None or chain.params(ranks) <= max_params:
            return ranks
    assert max_params is not None
    least_error = _LeastError(chain, min(max_params, chain.params(chain.caps)))
    ranks = _search(least_error, least_error.initial_ranks())
    # Of the choices with this error, or with the allowed one, the one with the fewest parameters.
    return _search(_FewestParams(chain, max(allowed or 0.0, chain.error(ranks))), ranks)


def _groups_of_equal_bonds(legs: Sequence[int]) -> list[list[int]]:
    """Group the bonds that must have one common rank: those around inner sites of leg 1."""
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
    """Error, parameters and constraints of ranks; ranks may be arrays that broadcast.

    The bonds on both sides of a leg of 1 can only be used at one common rank. They count as one
    bond here, and ``unit_sites`` is the number of such sites inside each bond.
    """

    tails: tuple[np.ndarray, ...]
    legs: tuple[int, ...]
    caps: tuple[int, ...]
    unit_sites: tuple[int, ...]

    @classmethod
    def of(cls, tails: Sequence[np.ndarray], shape: MPOShape, caps: Sequence[int]) -> _Chain:
        reachable = [min(cap, len(tail) - 1) for cap, tail in zip(caps, tails, strict=True)]
        largest, groups = shape.bond_dims(reachable), _groups_of_equal_bonds(shape.legs)
        inner = (leg for leg in shape.legs[1:-1] if leg > 1)
        return cls(
            tuple(_sum([tails[bond][: largest[bond] + 1] for bond in group]) for group in groups),
            (shape.legs[0], *inner, *shape.legs[1:][-1:]),
            tuple(largest[group[0]] for group in groups),
            tuple(len(group) - 1 for group in groups),
        )

    def rank_of_every_bond(self, ranks: _Ranks) -> tuple[int, ...]:
        """Repeat the ranks for bonds that count as one here."""
        pairs = zip(ranks, self.unit_sites, strict=True)
        return tuple(rank for rank, units in pairs for _ in range(1 + units))

    def error(self, ranks: _Ranks) -> Any:
        """Predict the squared error, added up from left to right so that it is reproducible."""
        return sum(tail[rank] for tail, rank in zip(self.tails, ranks, strict=True))

    def params(self, ranks: _Ranks) -> Any:
        """Count the parameters."""
        padded = (1, *ranks, 1)
        in_bonds = sum(
            units * rank**2 for units, rank in zip(self.unit_sites, ranks, strict=True) if units
        )
        return in_bonds + sum(padded[k] * leg * padded[k + 1] for k, leg in enumerate(self.legs))

    def fit_together(self, ranks: _Ranks) -> Any:
        """Check whether no rank exceeds what its neighbours can use."""
        padded = (1, *ranks, 1)
        fits: Any = True
        for left, leg, right in zip(padded[:-1], self.legs, padded[1:], strict=True):
            fits = fits & (right <= leg * left) & (left <= leg * right)
        return fits

    def range_of(self, bond: int, ranks: _Ranks) -> tuple[Any, Any]:
        """Return the least and the largest rank that a bond may have beside its neighbours.

        Where the neighbours contradict each other, both are the largest.
        """
        padded = (1, *ranks, 1)
        left, right = padded[bond], padded[bond + 2]
        leg_left, leg_right = self.legs[bond], self.legs[bond + 1]
        largest = np.minimum(np.minimum(leg_left * left, leg_right * right), self.caps[bond])
        least = np.maximum(-(-left // leg_left), -(-right // leg_right))
        return np.minimum(least, largest), largest

    def at_common_error(self, error: float) -> tuple[int, ...]:
        """Return ranks that fit together and lose at most ``error`` per bond, if caps permit."""
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
        """Return all errors between which :meth:`at_common_error` changes, ascending."""
        return np.unique(np.concatenate(self.tails))


@dataclass(frozen=True)
class _FewestParams:
    """The goal of fewest parameters with a squared error of at most ``allowed``."""

    chain: _Chain
    allowed: float

    def is_met(self, ranks: _Ranks) -> Any:
        return self.chain.error(ranks) <= self.allowed

    def keys(self, ranks: _Ranks) -> tuple[Any, Any]:
        """Return the quantity to minimise, and the one that decides between equals."""
        return self.chain.params(ranks), self.chain.error(ranks)

    def set_best_rank(self, ranks: list[Any], bond: int) -> None:
        """Set one bond to its best rank beside the others: the least that meets the goal."""
        low, high = self.chain.range_of(bond, ranks)
        # The bisection compares the very sum that decides in the end: ``allowed`` minus the other
        # tails would round differently.
        for _ in range(self.chain.caps[bond].bit_length()):
            ranks[bond] = (low + high) // 2
            is_met = self.is_met(ranks)
            low = np.where(is_met, low, np.minimum(ranks[bond] + 1, high))
            high = np.where(is_met, ranks[bond], high)
        ranks[bond] = high

    def bounds(self, initial: tuple[int, ...]) -> tuple[int, float]:
        """Return the most parameters and error of any choice no worse than ``initial``."""
        return self.chain.params(initial), self.allowed

    def initial_ranks(self) -> tuple[int, ...]:
        """Return the ranks of the largest common error that meets the goal."""
        chain, errors = self.chain, self.chain.common_errors()
        first_missed = bisect_left(
            errors, True, key=lambda error: not self.is_met(chain.at_common_error(error))
        )
        return chain.at_common_error(errors[first_missed - 1])


@dataclass(frozen=True)
class _LeastError:
    """The goal of least squared error with at most ``max_params`` parameters."""

    chain: _Chain
    max_params: int

    def is_met(self, ranks: _Ranks) -> Any:
        return self.chain.params(ranks) <= self.max_params

    def keys(self, ranks: _Ranks) -> tuple[Any, Any]:
        """Return the quantity to minimise, and the one that decides between equals."""
        return self.chain.error(ranks), self.chain.params(ranks)

    def set_best_rank(self, ranks: list[Any], bond: int) -> None:
        """Set one bond to its best rank beside the others: the largest that meets the goal."""
        low, high = self.chain.range_of(bond, ranks)
        padded = (1, *ranks, 1)
        legs, units = self.chain.legs, self.chain.unit_sites[bond]
        params_per_rank = padded[bond] * legs[bond] + legs[bond + 1] * padded[bond + 2]
        ranks[bond] = 0
        left_over = self.max_params - self.chain.params(ranks)
        ranks[bond] = np.clip(_largest_rank(params_per_rank, units, left_over), low, high)

    def bounds(self, initial: tuple[int, ...]) -> tuple[int, float]:
        """Return the most parameters and error of any choice no worse than ``initial``."""
        return self.max_params, self.chain.error(initial)

    def initial_ranks(self) -> tuple[int, ...]:
        """Return the ranks of the smallest common error that meets the goal."""
        chain, errors = self.chain, self.chain.common_errors()
        first = bisect_left(
            errors, True, key=lambda error: bool(self.is_met(chain.at_common_error(error)))
        )
        return chain.at_common_error(errors[first])


_Goal: TypeAlias = _FewestParams | _LeastError


def _largest_rank(linear: Any, quadratic: int, max_params: Any) -> Any:
    """Return the largest r with linear · r + quadratic · r² ≤ max_params; below 1 for no such r."""
    if not quadratic:
        return max_params // linear
    root = np.sqrt(np.maximum(0, linear * linear + 4.0 * quadratic * max_params))
    rank = np.floor((root - linear) / (2 * quadratic)).astype(np.int64)
    # Rounding may have missed it by one.
    rank += (linear + quadratic * (rank + 1)) * (rank + 1) <= max_params
    return rank - ((linear + quadratic * rank) * rank > max_params)


def _search(goal: _Goal, initial: tuple[int, ...]) -> tuple[int, ...]:
    """Find the best ranks for a goal: among all if these are few enough, else by local search.

    The result is no worse than ``initial``, which must meet the goal.
    """
    all_bonds = tuple(range(len(initial)))
    if prod(goal.chain.caps) // max(goal.chain.caps) <= _MAX_EXHAUSTIVE:
        return _best_in_block(goal, initial, all_bonds, _MAX_EXHAUSTIVE)
    coarse = _coarse_search(goal, initial)
    return min(_local_search(goal, initial), _local_search(goal, coarse), key=goal.keys)


def _coarse_search(goal: _Goal, initial: tuple[int, ...]) -> tuple[int, ...]:
    """Find roughly the best choice by a dynamic programme over the bonds from left to right.

    It tries some ranks per bond. Among the choices up to a bond that end in the same rank and have
    about the same number of parameters, it follows the one with the least error.
    """
    chain = goal.chain
    max_params, max_error = goal.bounds(initial)
    paths = np.ones((1, 1), dtype=np.int64)
    params, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    for bond, (cap, leg) in enumerate(zip(chain.caps, chain.legs[:-1], strict=True)):
        ranks = _some_ranks(cap, initial[bond], _COARSE_RANKS)
        left = paths[:, -1:]
        params = params[:, None] + (left * leg + chain.unit_sites[bond] * ranks) * ranks
        error = error[:, None] + chain.tails[bond][ranks]
        least_params = params + ranks * chain.legs[bond + 1] + sum(chain.legs[bond + 2 :])
        fits = (ranks <= leg * left) & (left <= leg * ranks)
        origin, column = np.nonzero(fits & (least_params <= max_params) & (error <= max_error))
        params, error = params[origin, column], error[origin, column]
        group = column * _COARSE_CLASSES + params * _COARSE_CLASSES // (max_params + 1)
        by_error = np.argsort(error)
        kept = by_error[np.unique(group[by_error], return_index=True)[1]]
        params, error = params[kept], error[kept]
        paths = np.column_stack([paths[origin[kept]], ranks[column[kept]]])
    choices = [tuple(path) for path in paths[:, 1:].tolist()]
    return min(choices, key=goal.keys, default=initial)


def _local_search(goal: _Goal, initial: tuple[int, ...]) -> tuple[int, ...]:
    """Improve a choice a few bonds at a time, until that no longer helps."""
    best, previous = initial, None
    while best != previous:
        previous = best
        for block in _blocks(len(initial)):
            best = _best_in_block(goal, best, block, _MAX_STEP)
    return best


def _blocks(bonds: int) -> Iterator[tuple[int, ...]]:
    """Yield the bonds to vary together: neighbours, whose products are parameters, and pairs."""
    for size in (4, 3):
        for first in range(bonds - size + 1):
            yield tuple(range(first, first + size))
    farthest = max(1, _MAX_PAIRS // bonds)
    for first in range(bonds):
        for second in range(first + 1, min(bonds, first + 1 + farthest)):
            yield first, second


def _best_in_block(
    goal: _Goal, initial: tuple[int, ...], block: tuple[int, ...], limit: int
) -> tuple[int, ...]:
    """Find the best choice that differs from ``initial`` only in the bonds of ``block``.

    It does not vary the largest bond of the block, whose best rank follows from the others.
    """
    chain = goal.chain
    dependent = max(block, key=lambda bond: chain.caps[bond])
    varied = [bond for bond in block if bond != dependent and chain.caps[bond] > 1]
    ranks: list[Any] = list(initial)
    for axis, candidates in enumerate(_candidates(chain.caps, initial, varied, limit)):
        ranks[varied[axis]] = candidates.reshape(-1, *(1,) * (len(varied) - axis - 1))
    goal.set_best_rank(ranks, dependent)
    fits = chain.fit_together(ranks) & goal.is_met(ranks)
    first, second = goal.keys(ranks)
    fits, first, second = np.broadcast_arrays(fits, first, second)
    if not fits.any():
        return initial
    minimal = fits & (first == first[fits].min())
    index = np.argmin(np.where(minimal, second, np.inf))
    found = tuple(int(np.broadcast_to(rank, fits.shape).flat[index]) for rank in ranks)
    return min(initial, found, key=goal.keys)


def _candidates(
    caps: Sequence[int], initial: Sequence[int], varied: Sequence[int], limit: int
) -> list[np.ndarray]:
    """Return the ranks to try at the varied bonds, at most about ``limit`` combinations in all.

    Bonds with few ranks try them all, which leaves more of the limit to the larger bonds.
    """
    candidates = {}
    ascending = sorted(varied, key=lambda bond: caps[bond])
    for position, bond in enumerate(ascending):
        number = max(2, int((limit + 0.5) ** (1 / (len(ascending) - position))))
        limit //= min(number, caps[bond])
        candidates[bond] = _some_ranks(caps[bond], initial[bond], number)
    return [candidates[bond] for bond in varied]


def _some_ranks(cap: int, around: int, number: int) -> np.ndarray:
    """Return up to ``number`` ranks from 1 to ``cap``: half of them near ``around``."""
    if cap <= number:
        return np.arange(1, cap + 1)
    near = around + np.arange(number // 2) - number // 4
    everywhere = np.linspace(1, cap, number - len(near)).round().astype(np.int64)
    return np.unique(np.concatenate([near.clip(1, cap), everywhere]))
