"""Matrix → MPO that keeps outputs: a sweep over the whitened matrix, and what it leaves to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.interleave import interleave
from tnmoe.chains.moments import Moments, number_of, weighted_norm
from tnmoe.chains.precision import check_range, computable, narrowed, widened
from tnmoe.chains.scaling import exponent_of
from tnmoe.chains.shared_fit import fit_shared
from tnmoe.chains.whitening import Whitening
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits

# Sweeps of alternating least squares, and the change of the relative error that ends them.
_MAX_SWEEPS = 50
_TOL = 1e-6

# Tolerances of the whitened matrix that are tried for a weighted error just within its own.
_TRIALS = 6

# Entries within this many binary orders of magnitude of 1 can be squared and summed in any dtype.
_SAFE_EXPONENT = 30

# Rounding of an error that is measured in double precision, relative to the norm of the matrix.
_ROUNDING = 2.0**-44

Sweep = Callable[[Array, Limits], tuple[MPO, TruncationInfo]]


def decompose_weighted(
    matrix: Array, moments: Array, limits: Limits, center_site: int, sweep: Sweep
) -> tuple[MPO, TruncationInfo]:
    """Decompose a matrix such that the error of its outputs is small.

    Parameters
    ----------
    matrix : array, shape (out_features, in_features)
    moments : array, shape (1, in_features, in_features)
        Second moments of the inputs, with mean eigenvalue 1.
    limits : Limits
        ``rtol`` limits the relative weighted error.
    center_site : int
        Site of the orthogonality centre.
    sweep : callable
        Decomposes a matrix, without weights, within limits.
    """
    task = _Task.of(matrix, moments, limits, center_site, sweep)
    rtol, whitening = limits.rtol, task.whitening
    if rtol is None or limits.bonds is not None:
        found = task.at(None)
        if rtol is not None and not task.fits(found[1]):
            raise InputError(
                f"bonds={limits.bonds} leave a weighted error of {found[1].weighted_error:.3g}, "
                f"more than rtol={rtol}"
            )
        return found
    if whitening.rest is None or not rtol or not task.size:
        return task.at(rtol)
    # With this tolerance of the whitened matrix, the weighted error is small enough.
    least = min(1.0, task.size / task.whitened_size / whitening.largest**0.5)
    best, loose, tight = None, -1.0, 1.0
    for _ in range(_TRIALS):
        middle = (loose + tight) / 2
        found = task.at(rtol * least**middle)
        if task.fits(found[1]):
            best, tight = found, middle
        else:
            loose = middle
    return best or task.at(rtol * least)


@dataclass(frozen=True)
class _Task:
    """A matrix in whitened form, and what to do with it.

    Attributes
    ----------
    matrix, moments, limits, center_site, sweep
        As for :func:`decompose_weighted`.
    scale : float
        Power of two by which the matrix is divided first.
    whitening : Whitening
    whitened : array, shape (1, out_features, padded_in)
    size, whitened_size : float
        Norms of the divided matrix, weighed by the moments, and of the whitened one.
    """

    matrix: Array
    moments: Array
    limits: Limits
    center_site: int
    sweep: Sweep
    scale: float
    whitening: Whitening
    whitened: Array
    size: float
    whitened_size: float

    @classmethod
    def of(
        cls, matrix: Array, moments: Array, limits: Limits, center_site: int, sweep: Sweep
    ) -> _Task:
        """Whiten a matrix; raise an InputError if a number is not finite."""
        xp, shape = get_backend(matrix), limits.shape
        scaled = computable(xp, matrix)
        subject = f"the {tuple(matrix.shape)} matrix contains"
        scale = 2.0 ** exponent_of(xp, scaled, _SAFE_EXPONENT, subject)
        scaled = scaled / scale
        whitening = Whitening.of(xp, moments, shape, range(shape.sites))
        whitened = whitening.apply(scaled[None])
        norm, whitened_norm = (number_of(xp, xp.norm(each)) for each in (scaled, whitened))
        size = weighted_norm(xp, scaled, norm, moments[0])
        return cls(
            matrix=matrix,
            moments=moments,
            limits=limits,
            center_site=center_site,
            sweep=sweep,
            scale=scale,
            whitening=whitening,
            whitened=whitened,
            size=size,
            whitened_size=whitened_norm,
        )

    def at(self, rtol: float | None) -> tuple[MPO, TruncationInfo]:
        """Decompose with a tolerance of the whitened matrix, and measure the errors."""
        xp, shape = get_backend(self.matrix), self.limits.shape
        dtype, site = xp.dtype_name(self.matrix), self.center_site
        within = replace(self.limits, shape=self.whitening.whole, rtol=rtol)
        found, info = self.sweep(self.whitened[0], within)
        cores = self.whitening.undo(_fitted(self.whitened, found, self.whitening))
        cores = list(canonicalize(xp, [core[0] for core in cores], None, site))
        check_range(xp, cores[site], dtype, self.scale)
        cores[site] = cores[site] * self.scale
        mpo = MPO(narrowed(xp, cores, dtype), shape, site)
        return mpo, _measured(self.matrix, mpo, self.moments[0], info, self.scale)

    def fits(self, info: TruncationInfo) -> bool:
        """Check whether the weighted error is within ``rtol``, but for rounding."""
        assert info.weighted_error is not None
        assert self.limits.rtol is not None
        rounding = 100 * EPSILON[get_backend(self.matrix).dtype_name(self.matrix)]
        return info.weighted_error <= self.limits.rtol + rounding


def _fitted(whitened: Array, mpo: MPO, whitening: Whitening) -> list[Array]:
    """Improve the sweep's cores, (1, D, out, in, D'), where whitening leaves moments."""
    if whitening.rest is None:
        return [core[None] for core in mpo.cores]
    xp, shape = whitening.xp, whitening.whole
    targets = interleave(xp, whitened, shape, 0).reshape(1, -1)
    merged = [core.reshape(1, core.shape[0], -1, core.shape[3]) for core in mpo.cores]
    moments = Moments(xp, whitening.rest, shape.out_dims, shape.in_dims)
    fit = fit_shared(xp, targets, merged, _MAX_SWEEPS, _TOL, moments)
    return [
        core.reshape(1, core.shape[1], *given.shape[1:3], core.shape[3])
        for core, given in zip(fit.cores, mpo.cores, strict=True)
    ]


def _measured(
    matrix: Array, mpo: MPO, moments: Array, info: TruncationInfo, scale: float
) -> TruncationInfo:
    """Add the measured errors to what a sweep reports of a matrix that was divided by a scale."""
    xp, shape = get_backend(matrix), mpo.shape
    wide, moments = widened(xp, matrix), widened(xp, moments)
    built = to_padded_matrix(xp, [widened(xp, core) for core in mpo.cores])
    missed = wide - built[: shape.out_features, : shape.in_features]
    error, norm = (number_of(xp, xp.norm(each)) for each in (missed, wide))
    sizes = [weighted_norm(xp, *pair, moments) for pair in ((missed, error), (wide, norm))]
    return replace(
        info,
        discarded=tuple(each * scale for each in info.discarded),
        spectra=tuple(each * scale for each in info.spectra),
        measured_error=error + _ROUNDING * (error + norm),
        weighted_error=sizes[0] / sizes[1] if sizes[1] else sizes[0],
    )
