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
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.decompose import check_matrix
from tnmoe.errors import (
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
    converged : bool
        Whether the last sweep changed this number by less than the tolerance.
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
    converged: bool
    start: str

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Every expert's error relative to its norm; 0 for zeros that are zeros still."""
        pairs = zip(self.errors, self.norms, strict=True)
        return tuple(error / norm if norm else inf if error else 0.0 for error, norm in pairs)

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
        found = _Experts.of(xp, matrices).search(finder, limits, residual)
    if found.missed:
        warnings.warn(
            f"rtol={limits.rtol} needs more than the other limits allow: the relative errors of "
            f"the experts {short_repr(found.missed)} are up to "
            f"{max(found.info.relative_errors):.3g}",
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
    roots : array, shape (E, 1, 1)
        Square roots of the norms; 1 for a matrix of zeros. Dividing by a tiny norm takes two steps.
    """

    xp: Backend
    given: Array
    matrices: Array
    norms: list[float]
    roots: Array

    @classmethod
    def of(cls, xp: Backend, given: Array) -> _Experts:
        """Measure the norms; raise an InputError if a number is not finite."""
        matrices = computable(xp, given)
        finite_max_abs(xp, matrices, "the matrices contain")
        norms = [_number(xp, xp.norm(matrix)) for matrix in matrices]
        roots = np.sqrt([norm or 1.0 for norm in norms])[:, None, None]
        return cls(xp, given, matrices, norms, xp.from_numpy(roots, like=matrices))

    def search(self, finder: ChainFinder, limits: SharedLimits, residual: bool) -> _Result:
        """Return the smallest result in which no expert misses ``rtol``, or the largest one."""
        if finder.takes_limits and not residual:
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
        chains = finder.find(self.matrices / self.roots / self.roots, bonds)
        return self._finish(finder, chains, limits)

    def _with_base(
        self, finder: ChainFinder, bonds: dict[str, object], limits: SharedLimits
    ) -> _Result:
        """Improve the base and the chains by turns."""
        count, *size = self.matrices.shape
        weights = self._weights()
        base = weights @ self.matrices.reshape(count, -1)
        best, history, converged = None, list[float](), False
        for _ in range(finder.max_sweeps):
            rest = self.matrices - base.reshape(1, *size)
            chains = finder.find(rest / self.roots / self.roots, bonds)
            deltas = chains.to_matrices(self.xp, finder.shape) * self.roots * self.roots
            missed = self.xp.norm((rest - deltas) / self.roots / self.roots)
            error = _number(self.xp, missed) / count**0.5
            converged = bool(history) and not history[-1] - error >= finder.tol
            if best is None or error < history[-1]:
                best = base, chains
                history.append(error)
            if converged:
                break
            base = weights @ (self.matrices - deltas).reshape(count, -1)
        assert best is not None, "there is at least one sweep"
        base, chains = best
        chains = Chains(chains.cores, tuple(history), converged, "mean of the experts")
        return self._finish(finder, chains, limits, base.reshape(*size))

    def _weights(self) -> Array:
        """Return the weights of experts in the best base, (1, E): 1 / ‖W_e‖², of sum 1."""
        least = min((norm for norm in self.norms if norm), default=1.0)
        weights = np.array([(least / norm) ** 2 if norm else 0.0 for norm in self.norms])
        if not weights.any():
            weights += 1.0
        return self.xp.from_numpy((weights / weights.sum())[None], like=self.matrices)

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
        scales = np.sqrt(self.norms) if base is None else xp.to_numpy(self.roots)
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
            missed = [n for n, error in enumerate(info.relative_errors) if error > allowed]
        return _Result(shared, info, missed)

    def _info_of(self, shared: SharedMPO, chains: Chains) -> SharedInfo:
        size = 0.0 if shared.base is None else _number(self.xp, shared.base.norm())
        errors = [self._error_of(shared, number) for number in range(len(self.norms))]
        return SharedInfo(
            errors=tuple(errors),
            error_bounds=tuple(
                error + _ROUNDING * (error + norm + size)
                for error, norm in zip(errors, self.norms, strict=True)
            ),
            norms=tuple(self.norms),
            history=chains.history,
            converged=chains.converged,
            start=chains.start,
        )

    def _error_of(self, shared: SharedMPO, number: int) -> float:
        """Measure the error of an expert in double precision."""
        xp, matrix = self.xp, widened(self.xp, self.given[number])
        cores = [core[number] if core.ndim == 5 else core for core in shared.cores]
        built = to_padded_matrix(xp, [widened(xp, core) for core in cores])
        built = built[: matrix.shape[0], : matrix.shape[1]]
        if shared.base is not None:
            built = built + widened(xp, shared.base.cores[0][0, :, :, 0])
        return _number(xp, xp.norm(matrix - built))


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
