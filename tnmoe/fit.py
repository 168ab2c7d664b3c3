"""Variational fit: the operator of given bonds that is nearest to a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains import algebra
from tnmoe.chains.canonical import canonicalize, shift_left, shift_right
from tnmoe.chains.precision import narrowed, widened
from tnmoe.chains.scaling import normalized_chains, times_power
from tnmoe.contraction.einsum import contract
from tnmoe.errors import InputError, check_number_in, check_positive_int
from tnmoe.mpo import MPO, check_alike
from tnmoe.truncation.limits import Limits


@dataclass(frozen=True)
class FitInfo:
    """Errors of a variational fit, sweep by sweep.

    Attributes
    ----------
    errors : tuple of float
        Relative Frobenius error after every sweep. It never grows, but for rounding. It is a
        difference of norms in double precision, so values below 1e-8 are rounding.
    converged : bool
        Whether the last sweep changed the error by less than the tolerance.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> target = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=2, rng=0)
    >>> fitted, info = fit(target, max_bond=1, return_info=True)
    >>> info.converged, 0 < info.errors[-1] < 1
    (True, True)
    """

    errors: tuple[float, ...]
    converged: bool

    def __repr__(self) -> str:
        sweeps, last = len(self.errors), self.errors[-1] if self.errors else None
        return f"FitInfo(error={last}, sweeps={sweeps}, converged={self.converged})"


@overload
def fit(
    target: MPO | Sequence[MPO],
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    initial: MPO | None = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def fit(
    target: MPO | Sequence[MPO],
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    initial: MPO | None = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, FitInfo]: ...


def fit(
    target: MPO | Sequence[MPO],
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    initial: MPO | None = None,
    max_sweeps: int = 20,
    tol: float = 1e-6,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, FitInfo]:
    """Fit an operator of given bonds to a target by alternating least squares.

    Each core in turn is replaced by the best one beside the other cores (Schollwöck, Ann. Phys.
    326, 96 (2011), section 4.5.2). In canonical form the best core is the target contracted with
    all other cores. No system of equations is solved, and a sum of targets is never formed.

    Parameters
    ----------
    target : MPO or sequence of MPO
        What to fit. Of a sequence, the sum is fitted.
    max_bond : int or sequence of int, optional
        Bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond.
    initial : MPO, optional
        Operator to start from, whose bonds the fit keeps; by default a random one. A rounded target
        is a better start, and the fit is then never worse than it.
    max_sweeps : int
        Largest number of sweeps to the right and back.
    tol : float
        Stop when a sweep changes the relative error by less than this.
    rng : numpy Generator or int
        Source of the random start.
    return_info : bool
        Also return the error after every sweep.

    Returns
    -------
    MPO
        In canonical form around the first site.
    FitInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the targets do not fit together, or if both or neither of bonds and ``initial`` are
        given.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> target = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=2, rng=0)
    >>> mpo, info = fit([target, target], max_bond=2, return_info=True)
    >>> round(float((mpo - 2 * target).norm() / target.norm()), 6)
    0.0
    """
    targets = [target] if isinstance(target, MPO) else list(target)
    if not targets:
        raise InputError("a fit needs at least one target, got none")
    for mpo in targets:
        check_alike(targets[0], mpo, "a fit")
    max_sweeps = check_positive_int("max_sweeps", max_sweeps)
    tol = check_number_in("tol", tol, "[0, inf)")
    start = _start(targets[0], initial, max_bond, bonds, rng)
    xp = get_backend(start.cores[0])
    with xp.full_precision(start.cores[0]):
        # In double precision, since an error is measured as a difference of norms.
        chains, exponent = normalized_chains(xp, [_widened(xp, mpo) for mpo in targets])
        (first,), _ = normalized_chains(xp, [_widened(xp, start)])
        cores, info = _alternate(xp, chains, first, max_sweeps, tol)
        cores[0] = times_power(cores[0], exponent)
        dtype = xp.dtype_name(start.cores[0])
        mpo = MPO(narrowed(xp, cores, dtype), start.shape, 0)
    return (mpo, info) if return_info else mpo


def _start(
    target: MPO,
    initial: MPO | None,
    max_bond: int | Sequence[int] | None,
    bonds: Sequence[int] | None,
    rng: np.random.Generator | int,
) -> MPO:
    if initial is None:
        if max_bond is None and bonds is None:
            raise InputError("a fit needs max_bond, bonds or an initial operator")
        caps = Limits(target.shape, max_bond=max_bond, bonds=bonds).caps
        return MPO.random(target.shape, caps, rng, like=target.cores[0])
    if max_bond is not None or bonds is not None:
        raise InputError("initial brings its own bonds: give no max_bond or bonds beside it")
    check_alike(target, initial, "a fit")
    return initial


def _widened(xp: Backend, mpo: MPO) -> list[Array]:
    return [widened(xp, core) for core in mpo.cores]


def _alternate(
    xp: Backend,
    chains: Sequence[Sequence[Array]],
    start: Sequence[Array],
    max_sweeps: int,
    tol: float,
) -> tuple[list[Array], FitInfo]:
    """Sweep until the error no longer shrinks; return cores canonical around the first site."""
    cores = list(canonicalize(xp, start, None, 0))
    last = len(cores) - 1
    squared = sum(_number(xp, algebra.inner(xp, a, b).real) for a in chains for b in chains)
    one = xp.eye(1, like=cores[0])
    # Per site k, the environments (D_target, D) of every target: left[k] of the part left of the
    # site, right[k] of the part right of it.
    left: list[list[Array]] = [[one] * len(chains)] + [[] for _ in range(last)]
    right: list[list[Array]] = [[] for _ in range(last)] + [[one] * len(chains)]
    for site in range(last, 0, -1):
        right[site - 1] = _extend_left(xp, chains, cores[site], right[site], site)
    errors: list[float] = []
    for _ in range(max_sweeps):
        for site in range(last):
            cores[site] = _best_core(xp, chains, left[site], right[site], site)
            cores[site], cores[site + 1] = shift_right(xp, cores[site], cores[site + 1])
            left[site + 1] = _extend_right(xp, chains, cores[site], left[site], site)
        for site in range(last, 0, -1):
            cores[site] = _best_core(xp, chains, left[site], right[site], site)
            cores[site - 1], cores[site] = shift_left(xp, cores[site - 1], cores[site])
            right[site - 1] = _extend_left(xp, chains, cores[site], right[site], site)
        cores[0] = _best_core(xp, chains, left[0], right[0], 0)
        missed = max(0.0, squared - _number(xp, xp.norm(cores[0])) ** 2)
        errors.append((missed / squared) ** 0.5 if squared else 0.0)
        if len(errors) > 1 and errors[-2] - errors[-1] < tol:
            return cores, FitInfo(tuple(errors), True)
    return cores, FitInfo(tuple(errors), last == 0)


def _best_core(
    xp: Backend,
    chains: Sequence[Sequence[Array]],
    left: Sequence[Array],
    right: Sequence[Array],
    site: int,
) -> Array:
    """Return the core that minimises the error, all other cores being isometries."""
    terms = [
        contract(xp, "ax,aoib,by->xoiy", before, chain[site], after)
        for chain, before, after in zip(chains, left, right, strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def _extend_right(
    xp: Backend, chains: Sequence[Sequence[Array]], core: Array, left: Sequence[Array], site: int
) -> list[Array]:
    bra = xp.conj(core)
    return [
        contract(xp, "ax,aoib,xoiy->by", before, chain[site], bra)
        for chain, before in zip(chains, left, strict=True)
    ]


def _extend_left(
    xp: Backend, chains: Sequence[Sequence[Array]], core: Array, right: Sequence[Array], site: int
) -> list[Array]:
    bra = xp.conj(core)
    return [
        contract(xp, "by,aoib,xoiy->ax", after, chain[site], bra)
        for chain, after in zip(chains, right, strict=True)
    ]


def _number(xp: Backend, array: Array) -> float:
    return float(xp.to_numpy(array).item())
