"""The search for a joint decomposition within limits, and the measurement of its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.moments import inner_product, number_of, of_expert, weighted_norm
from tnmoe.chains.precision import computable, narrowed, widened
from tnmoe.chains.scaling import finite_max_abs
from tnmoe.chains.shared_fit import inverse
from tnmoe.chains.whitening import Whitening
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.joint.finder import ChainFinder, Chains
from tnmoe.joint.info import SharedInfo, relative
from tnmoe.joint.limits import SharedLimits
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO

# Rounding of an error that is measured in double precision, relative to the norm of the matrix.
_ROUNDING = 2.0**-44

# Tolerances of all experts together that are tried until every expert is within its own.
_TRIALS = 5


@dataclass(frozen=True)
class Result:
    """A decomposition, what it lost, and the experts that miss the tolerance."""

    shared: SharedMPO
    info: SharedInfo
    missed: list[int]


@dataclass(frozen=True)
class Experts:
    """The matrices of experts, and their norms.

    Attributes
    ----------
    given : array, shape (E, out, in)
        As the caller gave them.
    matrices : array, shape (E, out, in)
        In a dtype with linear algebra.
    norms : list of float
    moments : array, shape (E, in, in) or (1, in, in), or None
        Second moments of the inputs.
    whitening : Whitening, or None
        Of the inputs.
    sizes : list of float
        The norms, weighed by the moments.
    shares : array of float, shape (E,)
        Factors of the relative errors in the sum: roots of the importances, 1 for the largest.
    """

    xp: Backend
    given: Array
    matrices: Array
    norms: list[float]
    moments: Array | None
    whitening: Whitening | None
    sizes: list[float]
    shares: np.ndarray

    @classmethod
    def of(
        cls, finder: ChainFinder, given: Array, moments: Array | None, importance: np.ndarray
    ) -> Experts:
        """Measure the norms; raise an InputError if a number is not finite."""
        xp, whitening = finder.xp, None
        matrices = computable(xp, given)
        finite_max_abs(xp, matrices, "the matrices contain")
        norms = [number_of(xp, xp.norm(matrix)) for matrix in matrices]
        sizes = norms
        if moments is not None:
            whitening = Whitening.of(xp, moments, finder.shape, finder.owned)
            sizes = [
                weighted_norm(xp, matrix, norm, of_expert(moments, number))
                for number, (matrix, norm) in enumerate(zip(matrices, norms, strict=True))
            ]
        # An expert that does not count at all would leave its cores to rounding.
        least = EPSILON[xp.dtype_name(matrices)] ** 0.25
        shares = np.sqrt(importance / importance.max()).clip(least)
        return cls(xp, given, matrices, norms, moments, whitening, sizes, shares)

    @property
    def roots(self) -> Array:
        """Roots of what matrices are divided by, (E, 1, 1): sizes by shares.

        Dividing by a tiny number takes two steps.
        """
        roots = np.sqrt(self.divisors / self.shares)
        return self.xp.from_numpy(roots[:, None, None], like=self.matrices)

    @property
    def divisors(self) -> np.ndarray:
        """The sizes, (E,); for zeros the largest one, with which they miss a part of the base."""
        largest = max(self.sizes) or 1.0
        return np.array([size or largest for size in self.sizes])

    def keeps_isometries(self, finder: ChainFinder) -> bool:
        """Check whether whitening changes no core but the central one."""
        if self.whitening is None:
            return True
        shape = finder.shape
        is_at_center = shape.in_dims[finder.center_site] == shape.padded_in
        return is_at_center and self.whitening.rest is None

    def more_alike(self, exponent: float) -> Experts:
        """Return experts whose importances are powers of these: all equal for the exponent 0."""
        return replace(self, shares=self.shares**exponent)

    def search(self, finder: ChainFinder, limits: SharedLimits, residual: bool) -> Result:
        """Return the smallest result in which no expert misses ``rtol``, or the largest one.

        The importances of experts give way where ``rtol`` needs it.
        """
        is_plain = self.whitening is None or self.whitening.rest is None
        if finder.takes_limits and not residual and is_plain:
            given = {"max_bond": limits.max_bond, "max_params": limits.max_params}
            given |= {"bonds": limits.bonds}
            trials = [
                partial(
                    self.more_alike(exponent)._without_base, finder, given | {"rtol": rtol}, limits
                )
                for rtol, exponent in _tolerances(
                    limits.rtol, 1 if finder.owns_all else len(self.norms)
                )
            ]
            return _first_that_fits(trials)
        family = [
            partial(self._at_bonds, finder, {"bonds": bonds}, limits, residual)
            for bonds in limits.family()
        ]
        return family[-1]() if limits.rtol is None else _smallest_that_fits(family)

    def _at_bonds(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits, residual: bool
    ) -> Result:
        alike = [self] if (self.shares == 1).all() else [self, self.more_alike(0.0)]
        attempts = [each._with_base if residual else each._without_base for each in alike]
        return _first_that_fits([partial(attempt, finder, bonds, limits) for attempt in attempts])

    def _without_base(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits
    ) -> Result:
        scaled = self.matrices / self.roots / self.roots
        factors = self._common_scale(with_base=False)[1]
        chains = finder.find(scaled, bonds, self.whitening, factors)
        return self._finish(finder, chains, limits)

    def _common_scale(self, with_base: bool) -> tuple[float, np.ndarray]:
        """Return the number that all chains shall be divided by, and factors that remain, (E,).

        Divided by its own size and times its share, a chain has its factor, of 1 at most.
        """
        counts = 1.0 if with_base else np.array(self.sizes) > 0
        inverse = self.shares / self.divisors * counts
        largest = float(inverse.max())
        return (1 / largest, inverse / largest) if largest else (0.0, np.ones_like(inverse))

    def _with_base(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits
    ) -> Result:
        """Improve the base and the chains by turns."""
        base, factors = self._best_base(self.matrices), self._common_scale(with_base=True)[1]
        best, history, converged = None, list[float](), False
        for _ in range(finder.max_sweeps):
            rest = (self.matrices - base) / self.roots / self.roots
            chains = finder.find(rest, bonds, self.whitening, factors)
            deltas = chains.to_matrices(self.xp, finder.shape)
            error = self._norm_of_all(rest - deltas) / float(np.linalg.norm(self.shares))
            converged = bool(history) and not history[-1] - error >= finder.tol
            if best is None or error < history[-1]:
                best = base, chains
                history.append(error)
            if converged:
                break
            base = self._best_base(self.matrices - deltas * self.roots * self.roots)
        assert best is not None, "there is at least one sweep"
        base, chains = best
        chains = replace(
            chains, history=tuple(history), converged=converged, start="mean of the experts"
        )
        return self._finish(finder, chains, limits, base[0])

    def _best_base(self, rests: Array) -> Array:
        """Return the matrix, (1, out, in), that is nearest to what is left of all experts.

        It is the mean, weighed by share² / size² and by the moments.
        """
        xp, (count, rows, columns) = self.xp, rests.shape
        least = min((size for size in self.sizes if size), default=1.0)
        shares = np.array([(least / size) ** 2 if size else 0.0 for size in self.sizes])
        shares *= self.shares**2
        if not shares.any():
            shares = self.shares**2
        shares = xp.from_numpy((shares / shares.sum())[None], like=rests)
        if self.moments is None or self.moments.shape[0] == 1:
            return (shares @ rests.reshape(count, -1)).reshape(1, rows, columns)
        total = shares @ (rests @ self.moments).reshape(count, -1)
        moments = (shares @ self.moments.reshape(count, -1)).reshape(1, columns, columns)
        return total.reshape(1, rows, columns) @ inverse(xp, moments)

    def _norm_of_all(self, matrices: Array) -> float:
        """Return the norm of all experts' matrices together, weighed by the moments."""
        if self.moments is None:
            return number_of(self.xp, self.xp.norm(matrices))
        return max(0.0, inner_product(self.xp, matrices, matrices @ self.moments)) ** 0.5

    def _finish(
        self,
        finder: ChainFinder,
        chains: Chains,
        limits: SharedLimits,
        base: Array | None = None,
    ) -> Result:
        """Give cores their scale, their axes and the caller's dtype; measure the errors."""
        xp, dtype = self.xp, self.xp.dtype_name(self.given)
        cores = [
            core if site in finder.owned else core[0] for site, core in enumerate(chains.cores)
        ]
        # The centre carries the norm, unless the experts share it and are free to scale.
        scaled = finder.center_site
        if finder.form == "canonical" and scaled not in finder.owned:
            scale = self._common_scale(base is not None)[0]
            cores[scaled] = cores[scaled] * scale**0.5 * scale**0.5
        else:
            # Without a base, the chain of a matrix of zeros is zero to the last digit.
            known = np.array(self.sizes) > 0
            scales = xp.to_numpy(self.roots)[:, 0, 0] * (known if base is None else 1.0)
            roots = xp.from_numpy(scales[:, None, None, None, None], like=self.matrices)
            scaled = scaled if scaled in finder.owned else finder.owned[0]
            cores[scaled] = cores[scaled] * roots * roots
        common = None
        if base is not None:
            whole = MPOShape((finder.shape.out_features,), (finder.shape.in_features,))
            common = MPO(narrowed(xp, [base[None, :, :, None]], dtype), whole)
        cores = narrowed(xp, cores, dtype)
        shared = SharedMPO(cores, finder.shape, finder.center_site, base=common)
        info = self._info_of(shared, chains)
        missed = []
        if limits.rtol is not None:
            allowed = limits.rtol + 100 * EPSILON[dtype]
            missed = [n for n, error in enumerate(info.limited_errors) if error > allowed]
        return Result(shared, info, missed)

    def _info_of(self, shared: SharedMPO, chains: Chains) -> SharedInfo:
        size = 0.0 if shared.base is None else number_of(self.xp, shared.base.norm())
        pairs = [self._errors_of(shared, number) for number in range(len(self.norms))]
        errors, weighted = zip(*pairs, strict=True)
        return SharedInfo(
            errors=errors,
            error_bounds=tuple(
                error + _ROUNDING * (error + norm + size)
                for error, norm in zip(errors, self.norms, strict=True)
            ),
            norms=tuple(self.norms),
            history=chains.history,
            weighted_errors=None if self.moments is None else weighted,
            converged=chains.converged,
            start=chains.start,
        )

    def _errors_of(self, shared: SharedMPO, number: int) -> tuple[float, float]:
        """Measure an expert's error, and the relative weighted one, in double precision."""
        xp, matrix = self.xp, widened(self.xp, self.given[number])
        cores = [core[number] if core.ndim == 5 else core for core in shared.cores]
        built = to_padded_matrix(xp, [widened(xp, core) for core in cores])
        built = built[: matrix.shape[0], : matrix.shape[1]]
        if shared.base is not None:
            built = built + widened(xp, shared.base.cores[0][0, :, :, 0])
        missed = matrix - built
        error = number_of(xp, xp.norm(missed))
        if self.moments is None:
            return error, 0.0
        moments, size = of_expert(self.moments, number), self.sizes[number]
        weighted = weighted_norm(xp, missed, error, widened(xp, moments))
        return error, relative(weighted, size)


def _tolerances(rtol: float | None, num_experts: int) -> list[tuple[float | None, float]]:
    """Return errors of all experts together to try, until each of them is within ``rtol``.

    Beside every error stands an exponent of the importances. With the last error all are equal,
    and no single expert can miss ``rtol``.
    """
    if rtol is None:
        return [(None, 1.0)]
    if not rtol or num_experts == 1:
        return [(rtol, 0.0)]
    steps = [trial / (_TRIALS - 1) for trial in range(_TRIALS)]
    return [(rtol * num_experts ** (-0.5 * step), 1 - step) for step in steps]


def _first_that_fits(trials: Sequence[Callable[[], Result]]) -> Result:
    """Return the first result in which no expert misses the tolerance, or else the last one."""
    for trial in trials:
        result = trial()
        if not result.missed:
            break
    return result


def _smallest_that_fits(family: Sequence[Callable[[], Result]]) -> Result:
    """Return the first result, of larger and larger ones, in which no expert misses the tolerance.

    If even the largest has experts that miss it, return that one.
    """
    best = family[-1]()
    lowest, highest = -1, len(family) - 1
    while not best.missed and highest - lowest > 1:
        middle = (lowest + highest) // 2
        result = family[middle]()
        if result.missed:
            lowest = middle
        else:
            highest, best = middle, result
    return best
