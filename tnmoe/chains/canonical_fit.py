"""Alternating least squares for chains in canonical form, some of whose cores experts share.

Arrays have an axis of experts in front, as in :mod:`tnmoe.chains.shared_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.moments import number_of
from tnmoe.chains.shared_fit import SharedFit, product_of


def fit_canonical(
    xp: Backend,
    targets: Array,
    cores: Sequence[Array],
    max_sweeps: int,
    tol: float,
    *,
    center_site: int,
    factors: np.ndarray,
) -> SharedFit:
    """Fit chains in canonical form to targets, from given chains on.

    Every core but the central one is an isometry towards the centre, for each expert. Beside the
    others, such a core maximises Re tr(Aᴴ V), where V is the target contracted with the other
    cores: the best one is the unitary polar factor of V (orthogonal Procrustes problem, Schönemann,
    Psychometrika 31, 1 (1966)). The best central core is the target's projection. No sweep raises
    the error.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    targets : array, shape (E, product of the legs)
        Legs in the order of the sites.
    cores : sequence of array, shapes (E, D, leg, D') or (1, D, leg, D')
        Cores of experts, or shared ones. Of those beside the centre only the polar factors count.
    max_sweeps, tol
        As for :func:`tnmoe.chains.shared_fit.fit_shared`.
    center_site : int
        Site of the central core.
    factors : array of float, shape (E,)
        The chain of an expert is this number times the product of its cores.
    """
    norm = number_of(xp, xp.norm(targets))
    best = [
        core if site == center_site else _polar(xp, core, site < center_site)
        for site, core in enumerate(cores)
    ]
    if not norm:
        best[center_site] = best[center_site] * 0.0
        return SharedFit(best, [0.0], True)
    scales = xp.from_numpy(factors[:, None], like=targets)
    errors: list[float] = []
    # A start has isometries that no central core belongs to.
    sites = [center_site]
    for _ in range(max_sweeps + 1):
        cores = _with_new(xp, targets, best, sites, center_site=center_site, factors=factors)
        error = number_of(xp, xp.norm(targets - scales * product_of(cores))) / norm
        # Only rounding can raise the error: nothing is left to gain.
        if errors and not error < errors[-1]:
            return SharedFit(best, errors, True)
        best, errors, sites = cores, [*errors, error], list(range(len(cores)))
        if len(errors) > 1 and errors[-2] - error < tol:
            return SharedFit(best, errors, True)
    return SharedFit(best, errors, False)


def _with_new(
    xp: Backend,
    targets: Array,
    cores: Sequence[Array],
    sites: Sequence[int],
    *,
    center_site: int,
    factors: np.ndarray,
) -> list[Array]:
    """Replace the cores of some sites from left to right."""
    cores, state = list(cores), targets
    for site, right in enumerate(_right_parts(xp, cores)):
        count, bond, leg, after = cores[site].shape
        state = state.reshape(len(factors), bond * leg, -1)
        if site in sites:
            projected = (state @ xp.adjoint(right)).reshape(-1, bond, leg, after)
            is_center = site == center_site
            if count == 1:
                projected = _combined(xp, projected, factors, is_center)
            cores[site] = projected if is_center else _polar(xp, projected, site < center_site)
        state = xp.adjoint(cores[site].reshape(count, bond * leg, after)) @ state
    return cores


def _combined(xp: Backend, projected: Array, factors: np.ndarray, is_center: bool) -> Array:
    """Return what a shared core is made of: Σ f V, for the centre divided by Σ f²."""
    total = float(np.square(factors).sum()) if is_center else 1.0
    row = xp.from_numpy((factors / total)[None], like=projected)
    return (row @ projected.reshape(len(factors), -1)).reshape(1, *projected.shape[1:])


def _right_parts(xp: Backend, cores: Sequence[Array]) -> list[Array]:
    """Return, for every site, the chain right of it, (e, D, legs)."""
    rights = [xp.eye(1, like=cores[0])[None]]
    for core in cores[:0:-1]:
        count, bond, leg, after = core.shape
        longer = core.reshape(count, bond * leg, after) @ rights[-1]
        rights.append(longer.reshape(longer.shape[0], bond, leg * rights[-1].shape[2]))
    return rights[::-1]


def _polar(xp: Backend, core: Array, is_left: bool) -> Array:
    """Return the nearest isometry, (e, D, leg, D'), of a core left or right of the centre."""
    count, bond, leg, after = core.shape
    if is_left:
        return _isometry(xp, core.reshape(count, bond * leg, after)).reshape(core.shape)
    rows = xp.adjoint(core.reshape(count, bond, leg * after))
    return xp.adjoint(_isometry(xp, rows)).reshape(core.shape)


def _isometry(xp: Backend, matrices: Array) -> Array:
    """Return the unitary polar factor of matrices that are taller than wide.

    A QR decomposition of s Vᴴ completes what singular values of zero leave open.
    """
    left, values = xp.left_svd(matrices)
    least = EPSILON[xp.dtype_name(matrices)]
    largest = values[..., :1] + (values[..., :1] == 0)
    is_rounding = (values / largest).clip(least) == least
    rows = xp.adjoint(left) @ (matrices / largest[..., None])
    # LAPACK makes NaN of complex numbers that are subnormal.
    right, triangle = xp.qr(xp.adjoint(rows * (is_rounding == 0)[..., None]))
    # The triangle is s times signs or phases, but for rounding.
    one = xp.eye(triangle.shape[-1], like=triangle)
    diagonal = triangle * one * (is_rounding == 0)[..., None] + one * is_rounding[..., None]
    squares = (diagonal * xp.conj(diagonal)).real
    phases = diagonal / (squares + (squares == 0)) ** 0.5
    return left @ xp.adjoint(right @ phases)
