"""Cross interpolation: a chain from some entries of a matrix, which the sweeps choose themselves.

Across bond b, the chain holds the matrix exactly at all entries whose left part is one of a few
*prefixes* and whose right part is one of a few *suffixes*. A sweep goes from site to site. It
evaluates the block of all entries with a known prefix, any legs of two neighbouring sites and a
known suffix, truncates the block, and chooses from its rows the prefixes of the next bond by volume
(Oseledets, Tyrtyshnikov, Linear Algebra Appl. 432, 70 (2010); Savostyanov, Oseledets, nDS 2011).

Everything here is NumPy in double precision, because choosing rows needs arrays of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from tnmoe.backends import backend_named
from tnmoe.chains.maxvol import maxvol
from tnmoe.chains.rounding import truncated_isometry
from tnmoe.shapes import MPOShape

_NUMPY = backend_named("numpy")


@dataclass(frozen=True)
class Indices:
    """Entries of a matrix, or parts of them: what some legs add to row and column numbers.

    Parameters
    ----------
    rows, columns : array of int64, shape (N,)
    """

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def zeros(cls, count: int) -> Indices:
        """Return indices that add nothing."""
        return cls(np.zeros(count, np.int64), np.zeros(count, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: np.ndarray | slice) -> Indices:
        return Indices(self.rows[chosen], self.columns[chosen])

    def __add__(self, other: Indices) -> Indices:
        return Indices(self.rows + other.rows, self.columns + other.columns)

    def with_each(self, other: Indices) -> Indices:
        """Add every index of ``other`` to every index, which is the slower of the two."""
        return Indices(
            np.add.outer(self.rows, other.rows).ravel(),
            np.add.outer(self.columns, other.columns).ravel(),
        )

    def joined(self, other: Indices) -> Indices:
        """Append the indices of ``other`` that are new."""
        both = np.stack(
            [np.append(self.rows, other.rows), np.append(self.columns, other.columns)], axis=1
        )
        first = np.sort(np.unique(both, axis=0, return_index=True)[1])
        return Indices(*both[first].T)


@dataclass(frozen=True)
class Site:
    """The legs of a site, and what one step along each adds to a row or column number."""

    out: int
    in_: int
    row_stride: int
    column_stride: int

    @property
    def size(self) -> int:
        """Number of values of both legs together."""
        return self.out * self.in_

    @property
    def legs(self) -> Indices:
        """What each value of the legs adds, shape (out · in,)."""
        rows, columns = np.divmod(np.arange(self.size, dtype=np.int64), self.in_)
        return Indices(rows * self.row_stride, columns * self.column_stride)

    def digits(self, entries: Indices) -> np.ndarray:
        """Return the value of the legs in every entry, from 0 to out · in − 1."""
        out = entries.rows // self.row_stride % self.out
        return out * self.in_ + entries.columns // self.column_stride % self.in_


def sites_of(shape: MPOShape) -> list[Site]:
    """Return the legs of all sites, left to right."""
    return [
        Site(
            shape.out_dims[site],
            shape.in_dims[site],
            prod(shape.out_dims[site + 1 :]),
            prod(shape.in_dims[site + 1 :]),
        )
        for site in range(shape.sites)
    ]


class CrossChain:
    """A cross interpolation under way.

    Parameters
    ----------
    evaluate : callable
        Returns the matrix at indices, as an array in double precision.
    shape : MPOShape
        At least two sites.
    caps : sequence of int
        Largest dimension of every bond.
    pivots : Indices
        Entries that the first sweep passes through, at least one.
    """

    def __init__(
        self,
        evaluate: Callable[[Indices], np.ndarray],
        shape: MPOShape,
        caps: Sequence[int],
        pivots: Indices,
    ) -> None:
        self._evaluate, self._caps = evaluate, caps
        self._sites, self._in_order = sites_of(shape), True
        # (D, out · in, D'). The first core holds entries of the matrix. All others interpolate
        # from suffixes. There are no cores before the first sweep.
        self._cores: list[np.ndarray] = []
        # Per site, what stands right of it. At the last site that is nothing, one empty suffix.
        self._suffixes = [Indices.zeros(0) for _ in caps] + [Indices.zeros(1)]
        self._largest = 0.0
        self.add_pivots(pivots)

    @property
    def bonds(self) -> tuple[int, ...]:
        """Bonds of the next sweep, if it does not change them."""
        return tuple(map(min, self._caps, map(len, self._suffixes)))

    @property
    def cores(self) -> list[np.ndarray]:
        """Cores (D, out · in, D') of all sites, left to right."""
        return self._cores if self._in_order else _mirrored(self._cores)

    def add_pivots(self, entries: Indices) -> None:
        """Let the next sweep pass through some entries."""
        suffixes = Indices.zeros(len(entries))
        for site in range(len(self._caps), 0, -1):
            legs = self._sites[site].legs
            suffixes = suffixes + legs[self._sites[site].digits(entries)]
            self._suffixes[site - 1] = self._suffixes[site - 1].joined(suffixes)

    def evaluations(self, cap: int) -> int:
        """Bound the number of entries that a sweep evaluates whose bonds are at most ``cap``."""
        total, prefixes = 0, 1
        sizes = [site.size for site in self._sites]
        for site, limit in enumerate(self._caps):
            rows = prefixes * sizes[site]
            columns = sizes[site + 1] * len(self._suffixes[site + 1])
            total += rows * columns
            prefixes = min(cap, limit, rows, columns)
        return total

    def affordable_cap(self, evaluations: int) -> int:
        """Return a bond with which a sweep keeps within a number of evaluations.

        The result is 0 if bonds would have to shrink.
        """
        cap, least = max(self._caps), max(self.bonds)
        while cap > least and self.evaluations(cap) > evaluations:
            cap = max(least, cap // 2)
        return cap if self.evaluations(cap) <= evaluations else 0

    def sweep(self, cap: int, tolerance: float) -> float:
        """Renew all cores from left to right, then turn the chain round for the sweep back.

        Parameters
        ----------
        cap : int
            Largest bond, beside ``caps``.
        tolerance : float
            Relative Frobenius error of the truncation of each block.

        Returns
        -------
        float
            Largest relative error that the chain had before in any block; infinity in the first
            sweep.
        """
        old, error = self._cores, 0.0 if self._cores else inf
        new, prefixes = list(old[:1]), [Indices.zeros(1)]
        for site, limit in enumerate(self._caps):
            rows = prefixes[-1].with_each(self._sites[site].legs)
            columns = self._sites[site + 1].legs.with_each(self._suffixes[site + 1])
            block = self._evaluate(rows.with_each(columns)).reshape(len(rows), len(columns))
            if old:
                error = max(error, self._error_in(block, new[site], old[site + 1]))
            basis = truncated_isometry(_NUMPY, block, min(cap, limit), tolerance)
            chosen, coefficients = maxvol(basis)
            interpolating = coefficients.reshape(len(prefixes[-1]), -1, len(chosen))
            center = block[chosen].reshape(len(chosen), self._sites[site + 1].size, -1)
            new[site:] = [interpolating, center]
            prefixes.append(rows[chosen])
        self._cores = new
        self._turn_round(prefixes)
        return error

    def _error_in(self, block: np.ndarray, core: np.ndarray, following: np.ndarray) -> float:
        """Measure the relative error of two neighbouring cores of the chain in their block."""
        self._largest = max(self._largest, float(np.abs(block).max()))
        # The suffixes of new pivots come last, and the chain does not have them yet.
        bond, size, last = following.shape
        predicted = np.tensordot(core[..., :bond], following, 1).reshape(len(block), size, last)
        known = block.reshape(len(block), size, -1)[..., :last]
        # Beside the largest entry, an error in a block of small ones does not count.
        scale = max(float(np.linalg.norm(known)), self._largest)
        return float(np.linalg.norm(known - predicted)) / scale if scale else 0.0

    def _turn_round(self, prefixes: Sequence[Indices]) -> None:
        """Exchange left and right, so that every sweep goes from left to right."""
        self._cores, self._in_order = _mirrored(self._cores), not self._in_order
        self._sites, self._caps = self._sites[::-1], self._caps[::-1]
        self._suffixes = list(reversed(prefixes))


def _mirrored(cores: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [core.transpose(2, 1, 0) for core in reversed(cores)]


def entries_of(cores: Sequence[np.ndarray], shape: MPOShape, entries: Indices) -> np.ndarray:
    """Evaluate a chain of cores (D, out · in, D') at some entries."""
    vectors = np.ones((len(entries), 1))
    for core, site in zip(cores, sites_of(shape), strict=True):
        digits = site.digits(entries)
        following = np.empty((len(entries), core.shape[-1]), core.dtype)
        for digit in np.unique(digits):
            here = digits == digit
            following[here] = vectors[here] @ core[:, digit]
        vectors = following
    return vectors[:, 0]
