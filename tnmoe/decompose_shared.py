"""Many matrices → chains of cores, some of which all of them share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import hypot, inf
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.precision import computable, narrowed, widened
from tnmoe.chains.scaling import finite_max_abs
from tnmoe.chains.shared_fit import inverse
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.decompose import check_matrix
from tnmoe.errors import (
    InputError,
    check_bool,
    check_number_in,
    check_one_of,
    check_positive_int,
    short_repr,
)
from tnmoe.mpo import MPO
from tnmoe.options import METHODS, Method
from tnmoe.shapes import MPOShape, SharedSites, resolve_center_site, resolve_shared_sites
from tnmoe.shared_chains import ChainFinder, Chains
from tnmoe.shared_mpo import SharedMPO
from tnmoe.truncation.shared_limits import SharedLimits

# Rounding of an error that is measured in double precision, relative to the norm of the matrix.
_ROUNDING = 2.0**-44

# Tolerances of all experts together that are tried until every expert is within its own.
_TRIALS = 5


@dataclass(frozen=True)
class SharedInfo:
    """What a joint decomposition lost, expert by expert.

    Attributes
    ----------
    errors : tuple of float
        ‖W_e − chain_e‖ of every expert in the Frobenius norm. They are measured in double
        precision on the result.
    error_bounds : tuple of float
        Bound on every expert's error: the measured one plus the rounding of the measurement.
    norms : tuple of float
        ‖W_e‖ of every expert.
    history : tuple of float
        The root mean square of the experts' relative errors, at the start and after every sweep of
        alternating least squares, or after every change of the base. It never grows. It is empty
        where a single decomposition finds the cores.
    weighted_errors : tuple of float, or None
        With ``weights``: every expert's error, weighed by the damped moments, relative to its
        matrix.
    converged : bool
        Whether the last sweep changed the history's number by less than the tolerance.
    start : str
        What the sweeps started from.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, decompose_shared
    >>> matrices = np.random.default_rng(0).normal(size=(3, 8, 8))
    >>> shape = MPOShape((2, 2, 2), (2, 2, 2))
    >>> shared, info = decompose_shared(matrices, shape, max_bond=4, return_info=True)
    >>> true = np.linalg.norm(matrices - shared.to_matrices(), axis=(1, 2))
    >>> bool((true <= info.error_bounds).all())
    True
    """

    errors: tuple[float, ...]
    error_bounds: tuple[float, ...] = field(repr=False)
    norms: tuple[float, ...] = field(repr=False)
    history: tuple[float, ...] = field(repr=False)
    weighted_errors: tuple[float, ...] | None
    converged: bool
    start: str

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Every expert's error relative to its norm; 0 for zeros that are zeros still."""
        return tuple(map(_ratio, self.errors, self.norms))

    @property
    def error_bound(self) -> float:
        """Bound on the error of all experts together, sqrt(Σ ‖W_e − chain_e‖²)."""
        return hypot(*self.error_bounds)


@overload
def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    shared_sites: SharedSites | None = ...,
    residual: bool = ...,
    weights: Array | None = ...,
    damping: float = ...,
    method: Method = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    return_info: Literal[False] = ...,
) -> SharedMPO: ...


@overload
def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    shared_sites: SharedSites | None = ...,
    residual: bool = ...,
    weights: Array | None = ...,
    damping: float = ...,
    method: Method = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    return_info: Literal[True],
) -> tuple[SharedMPO, SharedInfo]: ...


def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    center_site: int | None = None,
    shared_sites: SharedSites | None = None,
    residual: bool = False,
    weights: Array | None = None,
    damping: float = 0.01,
    method: Method = "auto",
    max_sweeps: int = 50,
    tol: float = 1e-5,
    return_info: bool = False,
) -> SharedMPO | tuple[SharedMPO, SharedInfo]:
    """Decompose matrices into chains that share some cores, such that their errors are small.

    The function minimises Σ_e ‖W_e − chain_e‖² / ‖W_e‖²: every expert counts alike.

    Bonds between owned and shared cores may be larger than a single matrix needs, up to E times.
    They lead from experts that share everything they can to experts that share nothing, and the
    error falls to zero.

    Parameters
    ----------
    matrices : array, shape (E, out_features, in_features)
        NumPy array or torch tensor, floating-point or complex.
    shape : MPOShape, optional
        Legs of the chains; by default ``MPOShape.for_matrix(out_features, in_features)``, with
        ``residual`` two sites with the legs (out | in).
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond.
    rtol : float, optional
        Largest relative Frobenius error of every expert.
    max_params : int, optional
        Largest number of stored parameters: those of shared cores and of the base once, those of
        owned cores per expert.
    center_site : int, optional
        Site of the central core; by default ``shape.center_site``.
    shared_sites : {"center", "none"} or iterable of int, optional
        Sites whose cores all experts share; not all of them. By default the central one, with
        ``residual`` none.
    residual : bool
        Add a matrix that all experts share, the *base*: W_e ≈ base + chain_e. With two sites the
        chains are matrices of low rank.
    weights : array, shape (E, in_features, in_features) or (in_features, in_features), optional
        Second moments E[x xᴴ] of the inputs x that every expert meets, or all experts meet. The
        function then minimises the errors of the outputs, E‖(W_e − chain_e) x‖², relative to
        E‖W_e x‖², and ``rtol`` limits their square roots. It takes longer.
    damping : float
        Share of the identity in the moments, whose mean eigenvalue is brought to 1 first. It keeps
        inputs that a short calibration did not show from being free.
    method : {"auto", "qr", "eigh", "svd", "randomized"}
        How to find isometries, as for :func:`decompose`.
    max_sweeps : int
        Largest number of sweeps of alternating least squares, or of changes of the base.
    tol : float
        Stop when a sweep changes the root mean square of the experts' relative errors by less.
    return_info : bool
        Also return the errors.

    Returns
    -------
    SharedMPO
        In the matrices' library, dtype and device. Without any limit it is exact.
    SharedInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the matrices are not of the shape's size, are not floating-point or complex, or hold
        NaN or infinity; if an argument is out of range or contradicts another.
    TypeError
        If the matrices belong to no supported library, or ``shape`` is not an MPOShape.

    Warns
    -----
    UserWarning
        If another limit keeps experts from their ``rtol``; the warning names them.

    See Also
    --------
    decompose_batch : Decompose matrices that share no core.

    Notes
    -----
    Where experts own the core of a single site, the matrices are one matrix whose rows that site
    tells apart, and a sweep of truncated decompositions finds all cores (:func:`decompose`). With
    two sites this is the best decomposition there is (Eckart and Young, Psychometrika 1, 211
    (1936)). Otherwise alternating least squares starts from such sweeps, and from the experts' own
    sweeps turned towards each other, and goes on from the best.

    With ``residual`` base and chains take turns. The base is the weighted mean of what the chains
    leave, and the chains decompose what the base leaves. With two sites no turn raises the error.
    The form is that of D²-MoE (Gu et al., arXiv:2502.17298), whose base is a mean of the experts,
    weighted by Fisher information.

    Gradients take the norms of the matrices, by which errors are weighed, for constants.

    With N numbers in all matrices, a sweep of least squares takes about 8·Σ D·N operations, and
    memory for three to five copies of the matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, decompose_shared
    >>> rng = np.random.default_rng(0)
    >>> base, own = rng.normal(size=(16, 8)), rng.normal(size=(4, 16, 8))
    >>> shape = MPOShape((4, 4, 1), (1, 2, 4))
    >>> experts = base + 0.1 * own  # 512 numbers
    >>> shared, info = decompose_shared(experts, shape, max_bond=4, return_info=True)
    >>> shared.num_params, max(info.relative_errors) < 0.1
    (256, True)
    >>> shared = decompose_shared(experts, residual=True, max_bond=1)
    >>> shared.num_params
    224
    """
    xp, residual = get_backend(matrices), check_bool("residual", residual)
    if residual and shape is None and matrices.ndim == 3:
        shape = MPOShape((matrices.shape[1], 1), (1, matrices.shape[2]))
    shape = check_matrix(matrices, shape, axes=3)
    center_site = resolve_center_site(shape, center_site)
    if shared_sites is None:
        shared_sites = "none" if residual else "center"
    shared = resolve_shared_sites(shared_sites, shape.sites, center_site)
    check_one_of("method", method, METHODS)
    finder = ChainFinder(
        xp=xp,
        shape=shape,
        owned=sorted(set(range(shape.sites)) - shared),
        num_experts=int(matrices.shape[0]),
        center_site=center_site,
        method=method,
        max_sweeps=check_positive_int("max_sweeps", max_sweeps),
        tol=check_number_in("tol", tol, "[0, inf)"),
    )
    limits = SharedLimits(
        shape,
        finder.owned,
        finder.num_experts,
        max_bond=max_bond,
        bonds=bonds,
        rtol=rtol,
        max_params=max_params,
        base_params=shape.out_features * shape.in_features if residual else 0,
    )
    with xp.full_precision(matrices):
        moments = None if weights is None else _damped(xp, weights, matrices, damping)
        found = _Experts.of(xp, matrices, moments).search(finder, limits, residual)
    if found.missed:
        warnings.warn(
            f"rtol={limits.rtol} needs more than the other limits allow: the relative errors of "
            f"the experts {short_repr(found.missed)} are up to {max(_limited(found.info)):.3g}",
            stacklevel=2,
        )
    return (found.shared, found.info) if return_info else found.shared


@dataclass(frozen=True)
class _Result:
    """A decomposition, what it lost, and the experts that miss the tolerance."""

    shared: SharedMPO
    info: SharedInfo
    missed: list[int]


@dataclass(frozen=True)
class _Experts:
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
    sizes : list of float
        The norms, weighed by the moments.
    roots : array, shape (E, 1, 1)
        Square roots of the sizes; 1 where a size is 0. Dividing by a tiny number takes two steps.
    """

    xp: Backend
    given: Array
    matrices: Array
    norms: list[float]
    moments: Array | None
    sizes: list[float]
    roots: Array

    @classmethod
    def of(cls, xp: Backend, given: Array, moments: Array | None) -> _Experts:
        """Measure the norms; raise an InputError if a number is not finite."""
        matrices = computable(xp, given)
        finite_max_abs(xp, matrices, "the matrices contain")
        norms = [_number(xp, xp.norm(matrix)) for matrix in matrices]
        sizes = norms
        if moments is not None:
            sizes = [
                _weighted_norm(xp, matrix, norm, _of_expert(moments, number))
                for number, (matrix, norm) in enumerate(zip(matrices, norms, strict=True))
            ]
        roots = np.sqrt([size or 1.0 for size in sizes])[:, None, None]
        return cls(xp, given, matrices, norms, moments, sizes, xp.from_numpy(roots, like=matrices))

    def search(self, finder: ChainFinder, limits: SharedLimits, residual: bool) -> _Result:
        """Return the smallest result in which no expert misses ``rtol``, or the largest one."""
        if finder.takes_limits and not residual and self.moments is None:
            given = {"max_bond": limits.max_bond, "max_params": limits.max_params}
            given |= {"bonds": limits.bonds}
            trials = [
                partial(self._without_base, finder, given | {"rtol": rtol}, limits)
                for rtol in _tolerances(limits.rtol, 1 if finder.owns_all else len(self.norms))
            ]
            return _first_that_fits(trials)
        attempt = self._with_base if residual else self._without_base
        family = [partial(attempt, finder, {"bonds": bonds}, limits) for bonds in limits.family()]
        return family[-1]() if limits.rtol is None else _smallest_that_fits(family)

    def _without_base(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits
    ) -> _Result:
        chains = finder.find(self.matrices / self.roots / self.roots, bonds, self.moments)
        return self._finish(finder, chains, limits)

    def _with_base(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits
    ) -> _Result:
        """Improve the base and the chains by turns."""
        base = self._best_base(self.matrices)
        best, history, converged = None, list[float](), False
        for _ in range(finder.max_sweeps):
            rest = (self.matrices - base) / self.roots / self.roots
            chains = finder.find(rest, bonds, self.moments)
            deltas = chains.to_matrices(self.xp, finder.shape)
            error = self._norm_of_all(rest - deltas) / len(self.norms) ** 0.5
            converged = bool(history) and not history[-1] - error >= finder.tol
            if best is None or error < history[-1]:
                best = base, chains
                history.append(error)
            if converged:
                break
            base = self._best_base(self.matrices - deltas * self.roots * self.roots)
        assert best is not None, "there is at least one sweep"
        base, chains = best
        chains = Chains(chains.cores, tuple(history), converged, "mean of the experts")
        return self._finish(finder, chains, limits, base[0])

    def _best_base(self, rests: Array) -> Array:
        """Return the matrix, (1, out, in), that is nearest to what is left of all experts.

        It is the mean, weighed by 1 / size² and by the moments.
        """
        xp, (count, rows, columns) = self.xp, rests.shape
        least = min((size for size in self.sizes if size), default=1.0)
        shares = np.array([(least / size) ** 2 if size else 0.0 for size in self.sizes])
        if not shares.any():
            shares += 1.0
        shares = xp.from_numpy((shares / shares.sum())[None], like=rests)
        if self.moments is None or self.moments.shape[0] == 1:
            return (shares @ rests.reshape(count, -1)).reshape(1, rows, columns)
        total = shares @ (rests @ self.moments).reshape(count, -1)
        moments = (shares @ self.moments.reshape(count, -1)).reshape(1, columns, columns)
        return total.reshape(1, rows, columns) @ inverse(xp, moments)

    def _norm_of_all(self, matrices: Array) -> float:
        """Return the norm of all experts' matrices together, weighed by the moments."""
        if self.moments is None:
            return _number(self.xp, self.xp.norm(matrices))
        row = self.xp.conj(matrices).reshape(1, -1)
        square = (row @ (matrices @ self.moments).reshape(-1, 1))[0, 0]
        return max(0.0, _number(self.xp, square.real)) ** 0.5

    def _finish(
        self,
        finder: ChainFinder,
        chains: Chains,
        limits: SharedLimits,
        base: Array | None = None,
    ) -> _Result:
        """Give cores their scale, their axes and the caller's dtype; measure the errors."""
        xp, dtype = self.xp, self.xp.dtype_name(self.given)
        cores = [
            core if site in finder.owned else core[0] for site, core in enumerate(chains.cores)
        ]
        # Without a base, the chain of a matrix of zeros is zero to the last digit.
        scales = np.sqrt(self.sizes) if base is None else xp.to_numpy(self.roots)
        roots = xp.from_numpy(np.reshape(scales, (-1, 1, 1, 1, 1)), like=self.matrices)
        cores[finder.owned[0]] = cores[finder.owned[0]] * roots * roots
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
            missed = [n for n, error in enumerate(_limited(info)) if error > allowed]
        return _Result(shared, info, missed)

    def _info_of(self, shared: SharedMPO, chains: Chains) -> SharedInfo:
        size = 0.0 if shared.base is None else _number(self.xp, shared.base.norm())
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
        error = _number(xp, xp.norm(missed))
        if self.moments is None:
            return error, 0.0
        moments, size = _of_expert(self.moments, number), self.sizes[number]
        weighted = _weighted_norm(xp, missed, error, widened(xp, moments))
        return error, _ratio(weighted, size)


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else inf if error else 0.0


def _limited(info: SharedInfo) -> tuple[float, ...]:
    """Return the errors that ``rtol`` limits."""
    return info.relative_errors if info.weighted_errors is None else info.weighted_errors


def _damped(xp: Backend, weights: Array, matrices: Array, damping: float) -> Array:
    """Check second moments; bring their mean eigenvalue to 1, and add the identity's share.

    Returns
    -------
    array, shape (E, in, in) or (1, in, in)
        Moments of zeros, of an expert without inputs, become the identity.
    """
    damping = check_number_in("damping", damping, "[0, 1]")
    experts, _, size = matrices.shape
    if get_backend(weights) is not xp:
        raise TypeError(
            f"weights must be an array of {xp.name}, as the matrices are, got {type(weights)}"
        )
    expected = (experts, size, size), (size, size)
    if tuple(weights.shape) not in expected:
        raise InputError(
            f"weights must have shape {expected[0]} or {expected[1]}, got {tuple(weights.shape)}"
        )
    moments = xp.astype(weights, xp.dtype_name(computable(xp, matrices)))
    moments = moments.reshape(-1, size, size)
    largest = finite_max_abs(xp, moments, "the weights contain")
    if xp.max_abs(moments - xp.adjoint(moments)) > 1e-3 * largest:
        raise InputError("weights must be Hermitian matrices: they are second moments of inputs")
    means = [_number(xp, xp.trace(each, 0, 1).real) / size for each in moments]
    if min(means) < 0:
        raise InputError(
            f"weights must be positive matrices, got one with mean eigenvalue {min(means):.3g}"
        )
    scales = np.array([(1 - damping) / mean if mean else 0.0 for mean in means])
    shares = np.array([damping if mean else 1.0 for mean in means])
    scaled = moments * xp.from_numpy(scales[:, None, None], like=moments)
    identity = xp.eye(size, like=moments)[None]
    return scaled + identity * xp.from_numpy(shares[:, None, None], like=moments)


def _of_expert(moments: Array, number: int) -> Array:
    return moments[number if moments.shape[0] > 1 else 0]


def _weighted_norm(xp: Backend, matrix: Array, norm: float, moments: Array) -> float:
    """Return sqrt(tr(W S Wᴴ)); ``norm`` is that of W, by which W is divided first."""
    if not norm:
        return 0.0
    root = norm**0.5
    scaled = matrix / root / root
    row, column = xp.conj(scaled).reshape(1, -1), (scaled @ moments).reshape(-1, 1)
    return max(0.0, _number(xp, (row @ column)[0, 0].real)) ** 0.5 * norm


def _tolerances(rtol: float | None, num_experts: int) -> list[float | None]:
    """Return errors of all experts together to try, until each of them is within ``rtol``.

    With the last one, no single expert can miss ``rtol``.
    """
    if not rtol or num_experts == 1:
        return [rtol]
    return [rtol * num_experts ** (-0.5 * trial / (_TRIALS - 1)) for trial in range(_TRIALS)]


def _first_that_fits(trials: Sequence[Callable[[], _Result]]) -> _Result:
    """Return the first result in which no expert misses the tolerance, or else the last one."""
    for trial in trials:
        result = trial()
        if not result.missed:
            break
    return result


def _smallest_that_fits(family: Sequence[Callable[[], _Result]]) -> _Result:
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


def _number(xp: Backend, array: Array) -> float:
    return float(xp.to_numpy(array))
