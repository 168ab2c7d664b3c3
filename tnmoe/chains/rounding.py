"""Rounding: smaller bonds for a chain of cores, without forming the matrix.

The chain is swept from left to right. What lies right of a bond enters only through a factor X
(D × columns) with the same X Xᴴ, found beforehand from right to left; what lies left of it is
already an isometry. So the Schmidt values of the bond are the singular values of M X, where M is
the core with what was carried into it, and M ≈ Q (Qᴴ M) with Q the leading left singular vectors
of M X: the same as TT-rounding (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), algorithm 2),
but the isometries right of the bond are never formed. For single precision the factors come from
Gram matrices in double precision (Al Daas, Ballard, Manning, IPDPS 2022), which are dense products.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, isfinite

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON, WIDE_DTYPE
from tnmoe.chains.unfolding import GramMatrix, TriangularFactor
from tnmoe.errors import InputError
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import ErrorBudget, Limits
from tnmoe.truncation.spectra import squared_tails

# Schmidt values below this many units in the last place of what they were made from are rounding.
_NOISE = 8.0
# Largest entries between 2 to the minus this and to the plus this are left as they are.
_NEAR = 8


def round_chain(
    xp: Backend, cores: Sequence[Array], selection: Limits
) -> tuple[list[Array], TruncationInfo]:
    """Round a chain of cores.

    Parameters
    ----------
    xp : Backend
        Library of the cores.
    cores : sequence of array, shapes (D, out, in, D')
        In a dtype with linear algebra.
    selection : Limits
        Bond dimensions asked for. A bond never grows, and Schmidt values that are rounding noise
        are always dropped unless ``bonds`` asks for them.

    Returns
    -------
    list of array
        Cores of the rounded chain, canonical around the last site.
    TruncationInfo
        What was cut.
    """
    pairs = [normalized(xp, core) for core in cores]
    scaled, exponent = [core for core, _ in pairs], sum(shift for _, shift in pairs)
    factors = right_factors(xp, scaled)
    spectra = None
    if selection.needs_spectra:
        spectra = [values[None] for values in _all_spectra(xp, scaled, factors)]
    limits = [core.shape[0] for core in cores[1:]]
    plan = selection.plan(spectra, limits)
    rounded, discarded, values = _sweep(xp, scaled, factors, plan, selection.bonds is not None)
    rounded[-1] = times_power(rounded[-1], exponent)
    info = TruncationInfo(
        tuple(float(np.ldexp(cut, exponent)) for cut in discarded),
        tuple(times_power(xp.astype(seen, "float64"), exponent) for seen in values),
        (_method(xp, cores[0]),) * len(discarded),
    )
    return rounded, info


def right_factors(xp: Backend, cores: Sequence[Array]) -> list[tuple[Array, int]]:
    """Per bond a factor X (D, columns) of what lies right of it, and its exponent.

    The right part R of the chain as a matrix (D, legs) has R Rᴴ = 4ᵉ X Xᴴ; powers of two are kept
    apart so that long chains neither over- nor underflow.
    """
    factors: list[tuple[Array, int]] = []
    factor, exponent = xp.eye(1, like=cores[0]), 0
    for core in reversed(cores[1:]):
        unfolding = (core.reshape(-1, core.shape[-1]) @ factor).reshape(core.shape[0], -1)
        factor, shift = normalized(xp, _factor(xp, unfolding))
        exponent += shift
        factors.append((factor, exponent))
    return factors[::-1]


def _factor(xp: Backend, unfolding: Array) -> Array:
    """A small X with the same X Xᴴ as an unfolding (rows, columns)."""
    rows, columns = unfolding.shape
    if columns <= rows:
        return unfolding
    if _method(xp, unfolding) == "eigh" and not xp.tracked(unfolding):
        vectors, values = GramMatrix.of(xp, unfolding).split(rows)
        return vectors * xp.astype(values, xp.dtype_name(unfolding))
    return xp.triangle(unfolding)


def _all_spectra(
    xp: Backend, cores: Sequence[Array], rights: Sequence[tuple[Array, int]]
) -> list[np.ndarray]:
    """Schmidt values of every bond, without those that are rounding noise."""
    mirrored = [xp.permute(core, (3, 1, 2, 0)) for core in reversed(cores)]
    lefts = right_factors(xp, mirrored)[::-1]
    spectra = []
    for (left, left_exponent), (right, right_exponent) in zip(lefts, rights, strict=True):
        joined = xp.transpose(left) @ right
        rows, columns = joined.shape
        joined = joined if rows <= columns else xp.transpose(joined)
        values = xp.to_numpy(_weights(xp, joined).values(min(rows, columns))).astype(np.float64)
        noise = _noise(xp, left, right)
        known = np.where(values > noise, values, 0.0)
        padded = np.zeros(right.shape[0])
        padded[: len(known)] = known[: len(padded)]
        spectra.append(np.ldexp(padded, left_exponent + right_exponent))
    return spectra


def _sweep(
    xp: Backend,
    cores: Sequence[Array],
    factors: Sequence[tuple[Array, int]],
    plan: ErrorBudget,
    keeps_noise: bool,
) -> tuple[list[Array], list[float], list[Array]]:
    """Truncate bond after bond; cores, 2-norms cut, and Schmidt values seen."""
    rounded, discarded, spectra = [], [], []
    carry, exponent = xp.eye(1, like=cores[0]), 0
    for bond, (core, (factor, shift)) in enumerate(zip(cores[:-1], factors, strict=True)):
        merged, grown = normalized(xp, carry @ core.reshape(core.shape[0], -1))
        exponent += grown
        merged = merged.reshape(-1, core.shape[-1])
        limit = min(merged.shape)
        weighted = merged @ factor
        vectors, values = _singular_vectors(xp, weighted)
        values = times_power(values, exponent + shift)
        seen = xp.to_numpy(values).astype(np.float64)
        if not keeps_noise:
            noise = np.ldexp(_noise(xp, merged, factor), exponent + shift)
            limit = max(1, min(limit, int((seen > noise).sum())))
        rank, cut = plan.choose(bond, seen[None], limit)
        isometry = vectors[:, :rank]
        if merged.shape[0] > weighted.shape[1]:
            isometry = xp.qr(weighted @ isometry)[0]
        carry = xp.adjoint(isometry) @ merged
        rounded.append(isometry.reshape(-1, *core.shape[1:3], rank))
        discarded.append(float(cut[0]))
        spectra.append(values)
    last = (carry @ cores[-1].reshape(cores[-1].shape[0], -1)).reshape(-1, *cores[-1].shape[1:])
    rounded.append(times_power(last, exponent))
    return rounded, discarded, spectra


def truncated_isometry(xp: Backend, matrix: Array, cap: float, rtol: float) -> Array:
    """Leading left singular vectors of a matrix: at most ``cap``, error at most ``rtol``."""
    vectors, values = _singular_vectors(xp, matrix)
    tails = squared_tails(xp.to_numpy(values))
    rank = int(np.argmax(tails <= rtol**2 * tails[0]))
    rank = max(1, int(min(rank, cap, min(matrix.shape))))
    kept = vectors[:, :rank]
    return xp.qr(matrix @ kept)[0] if matrix.shape[0] > matrix.shape[1] else kept


def _singular_vectors(xp: Backend, matrix: Array) -> tuple[Array, Array]:
    """Singular vectors of a matrix on its shorter side, left ones if square; Schmidt values."""
    rows, columns = matrix.shape
    if rows > columns:
        matrix = xp.adjoint(matrix)
    return _weights(xp, matrix).split(min(rows, columns))


def _weights(xp: Backend, matrix: Array) -> GramMatrix | TriangularFactor:
    return (GramMatrix if _method(xp, matrix) == "eigh" else TriangularFactor).of(xp, matrix)


def _method(xp: Backend, array: Array) -> str:
    return "eigh" if xp.dtype_name(array) in WIDE_DTYPE else "svd"


def _noise(xp: Backend, left: Array, right: Array) -> float:
    """What rounding may leave of a Schmidt value that cancels, given the factors it came from."""
    epsilon = EPSILON[xp.dtype_name(left)]
    return _NOISE * epsilon * float(xp.to_numpy(xp.norm(left))) * float(xp.to_numpy(xp.norm(right)))


def near_one(xp: Backend, chains: Sequence[Sequence[Array]]) -> tuple[list[list[Array]], int]:
    """Chains divided by one power of two, in cores near 1, whose products can be squared.

    Returns
    -------
    list of list of array
        The largest chain's cores have entries near 1; the others are as small beside it as before.
    int
        The exponent that was taken out of every chain.
    """
    pairs = [[normalized(xp, core) for core in chain] for chain in chains]
    exponents = [sum(exponent for _, exponent in each) for each in pairs]
    # The exponents of a chain that is zero say nothing.
    nonzero = [all(xp.max_abs(core) for core, _ in each) for each in pairs]
    most = max((e for e, counts in zip(exponents, nonzero, strict=True) if counts), default=0)
    scaled = [[core for core, _ in each] for each in pairs]
    for cores, exponent, counts in zip(scaled, exponents, nonzero, strict=True):
        cores[-1] = times_power(cores[-1], exponent - most) if counts else cores[-1]
    return scaled, most


def normalized(xp: Backend, array: Array) -> tuple[Array, int]:
    """An array divided by a power of two, so that its largest entry is near 1; the exponent."""
    largest = xp.max_abs(array)
    if not isfinite(largest):
        raise InputError("the cores of an operator contain NaN or infinity")
    exponent = frexp(largest)[1] if largest else 0
    if abs(exponent) <= _NEAR:
        return array, 0
    return times_power(array, -exponent), exponent


def times_power(array: Array, exponent: int) -> Array:
    """An array times a power of two, by two factors that each fit where the result fits."""
    if exponent == 0:
        return array
    half = exponent // 2
    return array * 2.0**half * 2.0 ** (exponent - half)
