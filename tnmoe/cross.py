"""A function of row and column → MPO, by cross interpolation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, overload

import numpy as np

from tnmoe.backends import Array, backend_named, get_backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains import algebra
from tnmoe.chains.cross import CrossChain, Indices, entries_of, sites_of
from tnmoe.chains.function_entries import FunctionEntries
from tnmoe.chains.precision import check_range
from tnmoe.chains.scaling import times_power
from tnmoe.errors import InputError, check_generator, check_positive_int
from tnmoe.mpo import MPO, round_mpo
from tnmoe.shapes import MPOShape, resolve_center_site
from tnmoe.truncation.limits import Limits

# The largest of the first random entries start the first sweep; the worst ones of later samples
# join the next sweep.
_PIVOTS = 4
# The tolerance is at least this many units in the last place of the function's numbers.
_ROUNDING = 128
# Part of the tolerance for the interpolation; the rest is for the rounding at the end. Each block
# of a sweep may lose a part of the former, because interpolation amplifies what a block loses.
_INTERPOLATION_PART = 0.5
_BLOCK_PART = 0.1
# The largest bond of the sweeps, as a multiple of the largest one allowed in the end. The rounding
# is nearly the best that a bond can do, and an interpolation is not.
_INTERIM_FACTOR = 2
# Sweeps without larger bonds or a smaller error, after which others would not help.
_STALLED = 3
_PROGRESS = 0.9

_NUMPY = backend_named("numpy")


@dataclass(frozen=True)
class CrossInfo:
    """What a cross interpolation evaluated, and how well it fits where it was tried.

    Attributes
    ----------
    evaluations : int
        Number of entries for which the function was called, repetitions included.
    estimated_error : float
        Relative Frobenius error, estimated from random entries that the interpolation did not use.
        It is no bound, and no guarantee: what the function does where nobody evaluated it, such as
        at a single large entry, no sample can know.
    sweeps : int
        Sweeps along the chain, in either direction.
    converged : bool
        Whether the last sweep, a fresh sample and the estimated error all found an error within the
        tolerance. This is no guarantee either.

    Examples
    --------
    >>> from tnmoe import MPOShape, cross
    >>> shape = MPOShape((2,) * 10, (2,) * 10)
    >>> _, info = cross(lambda rows, columns: 1.0 / (rows + columns + 1), shape, return_info=True)
    >>> info.converged, info.estimated_error < 1e-6, info.evaluations < 2**17
    (True, True, True)
    """

    evaluations: int
    estimated_error: float
    sweeps: int
    converged: bool


@overload
def cross(
    function: Callable[[np.ndarray, np.ndarray], Array],
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = ...,
    rtol: float | None = ...,
    pivots: tuple[Any, Any] | None = ...,
    max_sweeps: int = ...,
    max_evaluations: int = ...,
    samples: int = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def cross(
    function: Callable[[np.ndarray, np.ndarray], Array],
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = ...,
    rtol: float | None = ...,
    pivots: tuple[Any, Any] | None = ...,
    max_sweeps: int = ...,
    max_evaluations: int = ...,
    samples: int = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, CrossInfo]: ...


def cross(
    function: Callable[[np.ndarray, np.ndarray], Array],
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = None,
    rtol: float | None = 1e-6,
    pivots: tuple[Any, Any] | None = None,
    max_sweeps: int = 20,
    max_evaluations: int = 10**7,
    samples: int = 1000,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, CrossInfo]:
    """Interpolate a matrix, given as a function of row and column, by an MPO.

    Only some entries are evaluated, so the matrix may be far too large to form. Sweeps over pairs
    of neighbouring sites choose these entries, and enlarge the bonds where the tolerance needs it.
    **The error is estimated and has no guarantee**: a function that is large only at entries that
    no sweep and no sample met looks like zero.

    Parameters
    ----------
    function : callable
        Takes rows and columns, two int64 arrays of NumPy of one shape (N,), and returns the N
        entries as an array (N,) of any supported library, floating-point or complex. It is called
        with up to 2²⁰ entries at once.
    shape : MPOShape
        Legs and size of the matrix. The function is not called in the padding, which is zero.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    rtol : float or None
        Relative Frobenius error to aim at. None, and tolerances below 128 units in the last place
        of the function's dtype, count as these 128 units, since rounding has no low rank.
    pivots : pair of sequence of int, optional
        Rows and columns of entries that the first sweep passes through. Give some where the
        function is large if it is zero nearly everywhere.
    max_sweeps : int
        Largest number of sweeps, in either direction.
    max_evaluations : int
        Largest number of entries to evaluate, for the sweeps and all samples.
    samples : int
        Random entries for the estimate of the error. As many more start the first sweep, and after
        every sweep as many show it where it went wrong.
    rng : numpy Generator or int
        Source of the random entries. A seed always gives the same result.
    return_info : bool
        Also return the estimated error, and what it took.

    Returns
    -------
    MPO
        In canonical form around ``shape.center_site``, with the library, dtype and device of the
        function's arrays. No gradients flow through it.
    CrossInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the function returns NaN, infinity, or anything but one number per entry; if
        ``max_evaluations`` is too few for one sweep; if an argument is out of range.
    TypeError
        If ``function`` is not callable, or ``shape`` is not an MPOShape.

    See Also
    --------
    decompose : An MPO of a matrix that is there, with a guaranteed error.

    Notes
    -----
    Two-site cross interpolation with rows of large volume (Oseledets, Tyrtyshnikov, Linear Algebra
    Appl. 432, 70 (2010); Savostyanov, Oseledets, nDS 2011). Random entries where the interpolation
    is worst join the next sweep. All is computed by NumPy in double precision.

    Examples
    --------
    A matrix of 2²⁰ × 2²⁰ entries:

    >>> def gaussian(rows, columns):
    ...     return np.exp(-(((rows - columns) / 2**18) ** 2))
    >>> mpo = cross(gaussian, MPOShape((4,) * 10, (4,) * 10))
    >>> mpo.shape.out_features, max(mpo.bond_dims) < 20
    (1048576, True)
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__qualname__}")
    _check_shape(shape)
    limits = Limits(shape, max_bond=max_bond, rtol=rtol)
    start = _check_pivots(pivots, shape)
    rng, samples = check_generator(rng), check_positive_int("samples", samples)
    max_sweeps = check_positive_int("max_sweeps", max_sweeps)
    entries = FunctionEntries(
        function, shape, check_positive_int("max_evaluations", max_evaluations)
    )
    entries.require(2 * samples, f"two times samples={samples}")
    held_out = _Sample.draw(entries, shape, samples, rng)
    tolerance = max(limits.rtol or 0.0, _ROUNDING * EPSILON[entries.dtype_name])
    run = _Run(entries, limits, tolerance, samples, rng)
    cores = run.interpolate(start, max_sweeps)
    mpo = _rounded(cores, replace(limits, rtol=(1 - _INTERPOLATION_PART) * tolerance))
    error = held_out.error_of(
        [core.reshape(core.shape[0], -1, core.shape[3]) for core in mpo.cores]
    )
    info = CrossInfo(entries.count, error, run.sweeps, run.converged and error <= tolerance)
    mpo = _as_returned(mpo, entries)
    return (mpo, info) if return_info else mpo


def _check_shape(shape: MPOShape) -> None:
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape, got {type(shape).__qualname__}: {shape!r}")
    largest = max(shape.padded_out, shape.padded_in)
    if largest > np.iinfo(np.int64).max:
        raise InputError(f"row and column numbers must fit 64 bits, got a matrix of {shape}")


def _check_pivots(pivots: tuple[Any, Any] | None, shape: MPOShape) -> Indices:
    """Return the pivots as indices; raise an InputError unless they are entries of the matrix."""
    if pivots is None:
        return Indices.zeros(0)
    try:
        rows, columns = (np.atleast_1d(np.asarray(part)) for part in pivots)
    except (TypeError, ValueError):
        raise InputError(f"pivots must be a pair (rows, columns), got {pivots!r}") from None
    if (
        rows.ndim != 1
        or rows.shape != columns.shape
        or {rows.dtype.kind, columns.dtype.kind} - set("iu")
    ):
        raise InputError(
            "pivots must be as many integers for rows as for columns, got shapes "
            f"{rows.shape} and {columns.shape} of {rows.dtype} and {columns.dtype}"
        )
    for name, part, size in (
        ("rows", rows, shape.out_features),
        ("columns", columns, shape.in_features),
    ):
        if part.size and not (part.min() >= 0 and part.max() < size):
            raise InputError(f"the {name} of pivots must be from 0 to {size - 1}, got {part}")
    return Indices(rows.astype(np.int64), columns.astype(np.int64))


@dataclass(frozen=True)
class _Sample:
    """Random entries of the matrix, with their values."""

    shape: MPOShape
    entries: Indices
    values: np.ndarray

    @classmethod
    def draw(
        cls, function: FunctionEntries, shape: MPOShape, size: int, rng: np.random.Generator
    ) -> _Sample:
        """Evaluate entries drawn with replacement."""
        rows = rng.integers(0, shape.out_features, size)
        entries = Indices(rows, rng.integers(0, shape.in_features, size))
        return cls(shape, entries, function(entries))

    def largest(self, values: np.ndarray) -> Indices:
        """Return a few entries at which some values are largest."""
        return self.entries[np.argsort(-np.abs(values), kind="stable")[:_PIVOTS]]

    def missed(self, cores: Sequence[np.ndarray]) -> np.ndarray:
        """Return the values less those of a chain of cores (D, out · in, D')."""
        return self.values - entries_of(cores, self.shape, self.entries)

    def error_of(self, cores: Sequence[np.ndarray]) -> float:
        """Estimate the relative Frobenius error of a chain.

        It is relative to the sample, or to the chain where that is larger: the sample may have
        missed what the chain has.
        """
        squared = float(algebra.inner(_NUMPY, cores, cores).real)
        matrix = float(self.shape.out_features) * float(self.shape.in_features)
        size = max(_mean_square(self.values), squared / matrix)
        return (_mean_square(self.missed(cores)) / size) ** 0.5 if size else 0.0


def _mean_square(values: np.ndarray) -> float:
    return float(np.mean(np.abs(values) ** 2))


@dataclass
class _Run:
    """Sweeps until the interpolation fits, or until more of them would not help."""

    entries: FunctionEntries
    limits: Limits
    tolerance: float
    samples: int
    rng: np.random.Generator
    sweeps: int = 0
    converged: bool = False

    def interpolate(self, pivots: Indices, max_sweeps: int) -> list[np.ndarray]:
        """Return cores (D, out · in, D')."""
        shape, entries = self.limits.shape, self.entries
        first = self._draw()
        if shape.sites == 1:
            entries.require(shape.legs[0], "the only site")
            self.converged = True
            return [entries(sites_of(shape)[0].legs)[None, :, None]]
        caps = shape.bond_dims([_INTERIM_FACTOR * cap for cap in self.limits.caps])
        chain = CrossChain(entries, shape, caps, pivots.joined(first.largest(first.values)))
        entries.require(chain.evaluations(max(chain.bonds)), "the first sweep")
        stalled, least, bonds = 0, inf, 0
        while not self.converged and self.sweeps < max_sweeps and stalled < _STALLED:
            error = self._sweep(chain)
            if error is None:
                break
            stalled = 0 if error < _PROGRESS * least or sum(chain.bonds) > bonds else stalled + 1
            least, bonds = min(error, least), max(bonds, sum(chain.bonds))
        return chain.cores

    def _sweep(self, chain: CrossChain) -> float | None:
        """Sweep once; return the largest error that was met, or None without evaluations left."""
        cap = chain.affordable_cap(self.entries.left - (self.samples if self.sweeps else 0))
        if not cap:
            return None
        tolerance = _INTERPOLATION_PART * self.tolerance
        error = chain.sweep(cap, _BLOCK_PART * tolerance / len(chain.bonds) ** 0.5)
        self.sweeps += 1
        if self.entries.left < self.samples:
            return None
        sample = self._draw()
        error = max(error, sample.error_of(chain.cores))
        self.converged = error <= tolerance
        chain.add_pivots(sample.largest(sample.missed(chain.cores)))
        return error

    def _draw(self) -> _Sample:
        return _Sample.draw(self.entries, self.limits.shape, self.samples, self.rng)


def _rounded(cores: Sequence[np.ndarray], limits: Limits) -> MPO:
    """Return an MPO of cores (D, out · in, D'), rounded."""
    legs = zip(limits.shape.out_dims, limits.shape.in_dims, strict=True)
    shaped = [
        core.reshape(core.shape[0], *leg, core.shape[-1])
        for core, leg in zip(cores, legs, strict=True)
    ]
    return round_mpo(MPO(shaped, limits.shape), limits)[0]


def _as_returned(mpo: MPO, entries: FunctionEntries) -> MPO:
    """Return an MPO as the function returned its numbers: in their size, library and dtype."""
    xp, cores = get_backend(entries.like), list(mpo.cores)
    site = resolve_center_site(mpo.shape, mpo.center_site)
    cores[site] = times_power(cores[site], entries.exponent)
    check_range(_NUMPY, cores[site], entries.dtype_name)
    converted = [xp.from_numpy(core, like=entries.like) for core in cores]
    return MPO(converted, mpo.shape, mpo.center_site)
