"""Rounding: smaller bonds for a chain of cores, without forming the matrix.

The chain is swept from left to right. The part right of a bond enters only through a factor X
(D × columns) with the same X Xᴴ, found beforehand from right to left. The part left of the bond is
already an isometry. The Schmidt values of the bond are therefore the singular values of M X, where
M is the core with what was carried into it, and M ≈ Q (Qᴴ M) with Q the leading left singular
vectors of M X. This equals TT-rounding (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), algorithm
2), but never forms the isometries right of the bond. For single precision the factors come from
Gram matrices in double precision (Al Daas, Ballard, Manning, IPDPS 2022), which are dense products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.precision import as_spectrum, widened
from tnmoe.chains.scaling import normalized, times_power
from tnmoe.chains.unfolding import GramMatrix, reduce_unfolding, reduction_method
from tnmoe.errors import InputError
from tnmoe.truncation.budget import ErrorBudget
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits
from tnmoe.truncation.spectra import squared_tails

# Schmidt values below this many units in the last place of their factors are rounding.
_NOISE = 8.0


def round_chain(
    xp: Backend, cores: Sequence[Array], limits: Limits
) -> tuple[list[Array], TruncationInfo]:
    """Round a chain of cores.

    Parameters
    ----------
    xp : Backend
        Library of the cores.
    cores : sequence of array, shapes (D, out, in, D')
        In a dtype with linear algebra.
    limits : Limits
        Bond dimensions and errors to keep to. A bond never grows. Schmidt values that are rounding
        noise are dropped, unless ``limits.bonds`` demands them or the cores have no numbers.

    Returns
    -------
    list of array
        Cores of the rounded chain, canonical around the last site.
    TruncationInfo
        What was cut.

    Raises
    ------
    InputError
        If a core holds NaN or infinity, the bonds do not fit, or cores without numbers have neither
        ``bonds`` nor ``max_bond``.
    """
    pairs = [normalized(xp, core) for core in cores]
    scaled, exponent = [core for core, _ in pairs], sum(shift for _, shift in pairs)
    factors = right_factors(xp, scaled)
    spectra = None
    if limits.needs_spectra:
        spectra = [values[None] for values in _all_spectra(xp, scaled, factors)]
    budget = limits.budget(spectra, present_bonds=[core.shape[0] for core in cores[1:]])
    keeps_noise = limits.bonds is not None or not all(map(xp.has_numbers, scaled))
    if keeps_noise and limits.bonds is None and limits.max_bond is None:
        raise InputError(
            f"the exact rank of a bond depends on numbers, which {xp.name} hides while it traces "
            "a function: give bonds or max_bond"
        )
    rounded, discarded, values = _truncate_bonds(xp, scaled, factors, budget, keeps_noise)
    rounded[-1] = times_power(rounded[-1], exponent)
    info = TruncationInfo(
        tuple(float(np.ldexp(lost, exponent)) for lost in discarded),
        tuple(times_power(widened(xp, spectrum), exponent) for spectrum in values),
        (reduction_method(xp, cores[0]),) * len(discarded),
    )
    return rounded, info


def right_factors(xp: Backend, cores: Sequence[Array]) -> list[tuple[Array, int]]:
    """Return per bond a factor X (D, columns) of the part right of it, and its exponent e.

    The right part R of the chain as a matrix (D, legs) has R Rᴴ = 4ᵉ X Xᴴ. Powers of two are kept
    apart so that long chains neither over- nor underflow.
    """
    factors: list[tuple[Array, int]] = []
    factor, exponent = xp.eye(1, like=cores[0]), 0
    for core in reversed(cores[1:]):
        unfolding = (core.reshape(-1, core.shape[-1]) @ factor).reshape(core.shape[0], -1)
        factor, shift = normalized(xp, _small_factor(xp, unfolding))
        exponent += shift
        factors.append((factor, exponent))
    return factors[::-1]


def _small_factor(xp: Backend, unfolding: Array) -> Array:
    """Return a small X with the same X Xᴴ as an unfolding (rows, columns)."""
    rows, columns = unfolding.shape
    if columns <= rows:
        return unfolding
    if reduction_method(xp, unfolding) == GramMatrix.method and not xp.tracked(unfolding):
        vectors, values = GramMatrix.of(xp, unfolding).singular_vectors(rows)
        return vectors * xp.astype(values, xp.dtype_name(unfolding))
    return xp.triangular_factor(unfolding)


def _all_spectra(
    xp: Backend, cores: Sequence[Array], rights: Sequence[tuple[Array, int]]
) -> list[np.ndarray]:
    """Return the Schmidt values of every bond, zeros in place of rounding noise."""
    mirrored = [xp.permute(core, (3, 1, 2, 0)) for core in reversed(cores)]
    lefts = right_factors(xp, mirrored)[::-1]
    spectra = []
    for (left, left_exponent), (right, right_exponent) in zip(lefts, rights, strict=True):
        joined = xp.transpose(left) @ right
        rows, columns = joined.shape
        joined = joined if rows <= columns else xp.transpose(joined)
        values = reduce_unfolding(xp, joined).schmidt_values(min(rows, columns))
        values = xp.to_numpy(values).astype(np.float64)
        signal = np.where(values > _noise(xp, left, right), values, 0.0)
        spectrum = np.zeros(right.shape[0])
        spectrum[: len(signal)] = signal[: len(spectrum)]
        spectra.append(np.ldexp(spectrum, left_exponent + right_exponent))
    return spectra


def _truncate_bonds(
    xp: Backend,
    cores: Sequence[Array],
    factors: Sequence[tuple[Array, int]],
    budget: ErrorBudget,
    keeps_noise: bool,
) -> tuple[list[Array], list[float], list[Array]]:
    """Truncate bond after bond; return cores, 2-norms of what was cut, and Schmidt values."""
    rounded, discarded, spectra = [], [], []
    carry, exponent = xp.eye(1, like=cores[0]), 0
    for bond, (core, (factor, shift)) in enumerate(zip(cores[:-1], factors, strict=True)):
        merged, grown = normalized(xp, carry @ core.reshape(core.shape[0], -1))
        exponent += grown
        merged = merged.reshape(-1, core.shape[-1])
        limit = min(merged.shape)
        whole = merged @ factor
        vectors, values = _singular_vectors(xp, whole)
        values = times_power(values, exponent + shift)
        spectrum = as_spectrum(xp, values)
        if not keeps_noise:
            noise = np.ldexp(_noise(xp, merged, factor), exponent + shift)
            limit = max(1, min(limit, int((spectrum > noise).sum())))
        rank, lost = budget.choose(bond, spectrum[None], limit)
        isometry = vectors[:, :rank]
        if merged.shape[0] > whole.shape[1]:
            isometry = xp.qr(whole @ isometry)[0]
        carry = xp.adjoint(isometry) @ merged
        rounded.append(isometry.reshape(-1, *core.shape[1:3], rank))
        discarded.append(float(lost[0]))
        spectra.append(values)
    last = (carry @ cores[-1].reshape(cores[-1].shape[0], -1)).reshape(-1, *cores[-1].shape[1:])
    rounded.append(times_power(last, exponent))
    return rounded, discarded, spectra


def truncated_isometry(xp: Backend, matrix: Array, cap: float, rtol: float) -> Array:
    """Return the leading left singular vectors: at most ``cap``, with an error within ``rtol``."""
    vectors, values = _singular_vectors(xp, matrix)
    rank = min(matrix.shape)
    if rtol or xp.has_numbers(values):
        tails = squared_tails(xp.to_numpy(values))
        rank = min(rank, int(np.argmax(tails <= rtol**2 * tails[0])))
    rank = max(1, int(min(rank, cap)))
    kept = vectors[:, :rank]
    return xp.qr(matrix @ kept)[0] if matrix.shape[0] > matrix.shape[1] else kept


def _singular_vectors(xp: Backend, matrix: Array) -> tuple[Array, Array]:
    """Return the singular vectors of a matrix on its shorter side, and its Schmidt values.

    Those of a square matrix are the left ones.
    """
    rows, columns = matrix.shape
    if rows > columns:
        matrix = xp.adjoint(matrix)
    return reduce_unfolding(xp, matrix).singular_vectors(min(rows, columns))


def _noise(xp: Backend, left: Array, right: Array) -> float:
    """Bound the rounding of a Schmidt value that should cancel, given its two factors."""
    epsilon = EPSILON[xp.dtype_name(left)]
    return _NOISE * epsilon * float(xp.to_numpy(xp.norm(left))) * float(xp.to_numpy(xp.norm(right)))
