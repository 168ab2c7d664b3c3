"""Choosing the bond dimensions of a whole MPO at once, from the Schmidt spectra of its bonds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, exp, isfinite, prod
from typing import Any, TypeAlias

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON, REAL_DTYPES
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape, positive_int
from tnmoe.spectrum import entanglement_entropy
from tnmoe.truncation import check_rtol, squared_tails

# Combinations of ranks looked at in one go; up to here the search is exhaustive. It takes tens of
# milliseconds, and covers five sites of a 3072 × 768 matrix at all ranks.
_MAX_EXHAUSTIVE = 2**17
# The same for one step of the local search, of which there are many.
_MAX_STEP = 2**12
# Ranks per bond, and classes of parameters per rank, in the coarse search that precedes it.
_COARSE_RANKS = 24
_COARSE_CLASSES = 48

# One rank per bond: integers, or integer arrays that broadcast to many choices at once.
_Ranks: TypeAlias = Sequence[Any]


def select_bonds(
    spectra: Sequence[Array],
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
) -> tuple[int, ...]:
    """Bond dimensions with the fewest parameters for an error, or the least error for a size.

    The squares of what the bonds cut add up to a bound on the squared error of the whole
    (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2). This prediction and the number
    of parameters are traded against each other over all bonds together, so an error is spent
    where it saves most. Where the spectra have few enough values the choice is the best there is;
    beyond (more than 2¹⁷ combinations of all bonds but the largest) it comes from a local search,
    and is never worse than cutting all bonds at one common error.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, in any array library, as in
        :attr:`TruncationInfo.spectra`.
    shape : MPOShape
        What the bonds belong to.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond. It wins over ``rtol``.
    bonds : sequence of int, optional
        Exactly these bonds: they are checked, against the other arguments too, and returned.
    rtol : float, optional
        Largest relative Frobenius error predicted for the whole.
    max_params : int, optional
        Largest number of parameters. It wins over ``rtol``.

    Returns
    -------
    tuple of int
        One dimension per bond, every one of which can be used: ``shape.bond_dims`` keeps them.

    Raises
    ------
    InputError
        If an argument is malformed, ``max_params`` is less than bonds of 1 need, or ``bonds``
        contradict another argument.

    Examples
    --------
    >>> import numpy as np
    >>> shape = MPOShape(out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    >>> spectra = [2.0 ** -np.arange(16), 4.0 ** -np.arange(16)]
    >>> select_bonds(spectra, shape, rtol=0.01)
    (7, 4)
    >>> select_bonds(spectra, shape, max_params=500)
    (7, 3)
    """
    caps = check_limits(shape, max_bond, bonds, rtol, max_params)
    values = _scaled(_check_spectra(spectra, shape))
    tails = [squared_tails(spectrum) for spectrum in values]
    allowed = None if rtol is None else _allowed_square(rtol, tails)
    if bonds is None:
        return choose_bonds(tails, shape, caps, allowed, max_params)
    cut = sum(tail[min(bond, len(tail) - 1)] for bond, tail in zip(caps, tails, strict=True))
    if allowed is not None and cut > allowed:
        raise InputError(f"bonds={caps} cut more than rtol={rtol} allows")
    return caps


def check_limits(
    shape: MPOShape,
    max_bond: int | Sequence[int] | None,
    bonds: Sequence[int] | None,
    rtol: float | None,
    max_params: int | None,
) -> tuple[int, ...]:
    """The largest dimension that each bond may have; ``bonds`` themselves where they are given.

    Raises
    ------
    InputError
        If an argument is out of range, or two of them contradict each other whatever the spectra.
    """
    check_rtol(rtol)
    caps = shape.bond_dims(max_bond)
    fewest = shape.num_params(1)
    if max_params is not None and positive_int("max_params", max_params) < fewest:
        raise InputError(
            f"max_params={max_params} is too few for {shape}: "
            f"with all bonds 1 it has {fewest} parameters"
        )
    if bonds is None:
        return caps
    chosen = _check_bonds(bonds, shape)
    if any(bond > cap for bond, cap in zip(chosen, caps, strict=True)):
        raise InputError(f"bonds={chosen} exceed max_bond={max_bond}")
    if max_params is not None and shape.num_params(chosen) > max_params:
        raise InputError(
            f"bonds={chosen} have {shape.num_params(chosen)} parameters, "
            f"more than max_params={max_params}"
        )
    return chosen


def bonds_by_entropy(
    spectra: Sequence[Array],
    shape: MPOShape,
    *,
    scale: float = 1.0,
    max_bond: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Bond dimensions in proportion to the effective number of Schmidt values at each bond.

    The exponential of the entanglement entropy counts Schmidt values by weight: m equal values
    count as m, and values of no weight count nothing. It asks for no error, so it compares how
    much the bonds carry rather than how well they are approximated.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, in any array library.
    shape : MPOShape
        What the bonds belong to.
    scale : float
        What the effective numbers are multiplied by, positive.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.

    Returns
    -------
    tuple of int
        Per bond: ``scale`` · exp(entropy), rounded up, at most the number of Schmidt values, and
        no more than ``max_bond`` and the neighbours can use.

    Raises
    ------
    InputError
        If an argument is malformed.

    Examples
    --------
    >>> import numpy as np
    >>> shape = MPOShape(out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    >>> bonds_by_entropy([np.array([1.0, 0, 0]), np.ones(10)], shape)
    (1, 10)
    """
    if not isinstance(scale, (int, float, np.floating)) or not isfinite(scale) or scale <= 0:
        raise InputError(f"scale must be a finite number above 0, got {scale!r}")
    caps = shape.bond_dims(max_bond)
    wanted = []
    for values, cap in zip(_check_spectra(spectra, shape), caps, strict=True):
        effective = min(scale * exp(entanglement_entropy(values)), cap, len(values))
        # exp(log m) may come out a little above m, and must not count as m + 1.
        wanted.append(max(1, ceil(effective * (1 - 1e-9))))
    return shape.bond_dims(wanted)


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

    Raises
    ------
    InputError
        If ``max_params`` is less than ranks of 1 need.
    """
    chain = _Chain.of(tails, shape, caps)
    if max_params is not None and chain.params(chain.ones) > max_params:
        raise InputError(
            f"max_params={max_params} is too small: {shape} has at least "
            f"{chain.params(chain.ones)} parameters (all bonds 1)"
        )
    if not tails or (allowed is None and max_params is None):
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


@dataclass(frozen=True)
class _Chain:
    """Error, parameters and limits of ranks; ranks may be arrays that broadcast."""

    tails: tuple[np.ndarray, ...]
    legs: tuple[int, ...]
    caps: tuple[int, ...]

    @classmethod
    def of(cls, tails: Sequence[np.ndarray], shape: MPOShape, caps: Sequence[int]) -> _Chain:
        legs = tuple(out * in_ for out, in_ in zip(shape.out_dims, shape.in_dims, strict=True))
        reachable = [min(cap, len(tail) - 1) for cap, tail in zip(caps, tails, strict=True)]
        return cls(tuple(tails), legs, shape.bond_dims(reachable))

    @property
    def ones(self) -> tuple[int, ...]:
        return (1,) * len(self.caps)

    def error(self, ranks: _Ranks) -> Any:
        """Predicted squared error; added up from left to right, so that it is reproducible."""
        return sum(tail[rank] for tail, rank in zip(self.tails, ranks, strict=True))

    def params(self, ranks: _Ranks) -> Any:
        padded = (1, *ranks, 1)
        return sum(padded[k] * leg * padded[k + 1] for k, leg in enumerate(self.legs))

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
        legs = self.chain.legs
        slope = padded[bond] * legs[bond] + legs[bond + 1] * padded[bond + 2]
        ranks[bond] = 0
        ranks[bond] = np.clip((self.budget - self.chain.params(ranks)) // slope, low, high)

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
        params = params[:, None] + left * leg * ranks
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
    yield from combinations(range(bonds), 2)


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


def _check_spectra(spectra: Sequence[Array], shape: MPOShape) -> list[np.ndarray]:
    """The spectra as NumPy arrays, refused unless they are one spectrum per bond."""
    if len(spectra) != shape.sites - 1:
        raise InputError(
            f"spectra need one array per bond: got {len(spectra)} for {shape.sites - 1} bonds"
        )
    return [_check_spectrum(bond, spectrum) for bond, spectrum in enumerate(spectra)]


def _check_spectrum(bond: int, spectrum: Array) -> np.ndarray:
    xp = get_backend(spectrum)
    name, dtype = f"the spectrum of bond {bond}", xp.dtype_name(spectrum)
    if spectrum.ndim != 1 or not len(spectrum) or dtype not in REAL_DTYPES:
        raise InputError(
            f"{name} must be a non-empty 1-D array of real floating-point numbers, got shape "
            f"{tuple(spectrum.shape)} and dtype {dtype}"
        )
    values = xp.to_numpy(xp.astype(spectrum, "float64"))
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError(f"{name} must be finite and nowhere negative")
    # Values that are equal but for rounding may come in any order.
    if (values[1:] > values[:-1] + 100 * EPSILON[dtype] * values.max()).any():
        raise InputError(f"{name} must be descending")
    return values


def _scaled(spectra: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The spectra divided by their largest value, so that squares neither over- nor underflow."""
    largest = max((values.max() for values in spectra), default=0.0)
    return [values / largest if largest > 0 else values for values in spectra]


def _allowed_square(rtol: float, tails: Sequence[np.ndarray]) -> float:
    """Squared absolute error that ``rtol`` allows; a tail of nothing kept is a squared norm."""
    square = max((float(tail[0]) for tail in tails), default=0.0)
    # Every bond together can lose one norm each; more cannot be allowed, and might overflow.
    return min(float(rtol), 1.0 + len(tails)) ** 2 * square


def _check_bonds(bonds: Sequence[int], shape: MPOShape) -> tuple[int, ...]:
    """The bonds as a tuple, refused unless all of every bond can be used."""
    if not isinstance(bonds, Sequence) or len(bonds) != shape.sites - 1:
        raise InputError(f"bonds need one value per bond: got {bonds} for {shape.sites - 1} bonds")
    chosen = tuple(positive_int("every bond", bond) for bond in bonds)
    if shape.bond_dims(chosen) != chosen:
        raise InputError(
            f"bonds={chosen} do not fit {shape}: the largest that fit are {shape.bond_dims(chosen)}"
        )
    return chosen
