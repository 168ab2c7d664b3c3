"""Gauge moves: orthogonality centres of a chain of cores.

A core left of the centre is an isometry when it is read as (left bond · legs) × right bond, and a
core right of it when it is read as left bond × (legs · right bond). The central core then has the
norm of the whole (Schollwöck, Ann. Phys. 326, 96 (2011), section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.chains.scaling import check_finite


def canonicalize(
    xp: Backend, cores: Sequence[Array], current: int | None, center_site: int
) -> tuple[Array, ...]:
    """Move the orthogonality centre to a site by QR decompositions.

    Parameters
    ----------
    xp : Backend
        Library of the cores.
    cores : sequence of array
        Shapes (D, out, in, D'), in a dtype with linear algebra (not a half precision).
    current : int or None
        Present centre; only the cores between it and ``center_site`` change. With None no gauge is
        known, and the sweep starts at both ends.
    center_site : int
        Site to move to.

    Returns
    -------
    tuple of array
        Cores of the same operator. A bond larger than its neighbours can use shrinks.
    """
    cores = list(cores)
    first = 0 if current is None else current
    last = len(cores) - 1 if current is None else current
    for site in range(first, center_site):
        cores[site], cores[site + 1] = shift_right(xp, cores[site], cores[site + 1])
    for site in range(last, center_site, -1):
        cores[site - 1], cores[site] = shift_left(xp, cores[site - 1], cores[site])
    return tuple(cores)


def vidal(xp: Backend, cores: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return the symmetric form Γ₁ λ₁ Γ₂ … λ Γₙ: cores Γ and Schmidt values λ between them.

    The chain is Γ₁·diag(λ₁)·Γ₂·…; λΓ is a left isometry at every site, and Γλ a right one (Vidal,
    Phys. Rev. Lett. 91, 147902 (2003)).

    Parameters
    ----------
    xp : Backend
        Library of the cores.
    cores : sequence of array
        Canonical around the first site. Bonds must have their exact rank, because the form divides
        by the Schmidt values.
    """
    gammas: list[Array] = []
    spectra: list[Array] = []
    rest = cores[0]
    for following in cores[1:]:
        bond = rest.shape[-1]
        unfolding = rest.reshape(-1, bond)
        isometry, values = xp.left_svd(unfolding)
        gamma = isometry.reshape(*rest.shape[:-1], -1)
        if spectra:
            gamma = gamma / _divisors(spectra[-1])
        gammas.append(gamma)
        spectra.append(values)
        moved = xp.adjoint(isometry) @ unfolding @ following.reshape(bond, -1)
        rest = moved.reshape(-1, *following.shape[1:])
    if spectra:
        rest = rest / _divisors(spectra[-1])
    return [*gammas, rest], spectra


def _divisors(values: Array) -> Array:
    """Return Schmidt values to divide cores by on the left, and 1 for the zero operator's 0."""
    return (values + (values == 0)).reshape(-1, 1, 1, 1)


def shift_right(xp: Backend, core: Array, following: Array) -> tuple[Array, Array]:
    """Make ``core`` a left isometry and move the triangular factor into the next core."""
    bond = core.shape[-1]
    isometry, rest = xp.qr(core.reshape(-1, bond))
    moved = rest @ following.reshape(bond, -1)
    return (
        isometry.reshape(*core.shape[:-1], -1),
        moved.reshape(-1, *following.shape[1:]),
    )


def shift_left(xp: Backend, preceding: Array, core: Array) -> tuple[Array, Array]:
    """Make ``core`` a right isometry and move the triangular factor into the previous core."""
    bond = core.shape[0]
    isometry, rest = xp.qr(xp.permute(core.reshape(bond, -1), (1, 0)))
    moved = preceding.reshape(-1, bond) @ xp.permute(rest, (1, 0))
    return (
        moved.reshape(*preceding.shape[:-1], -1),
        xp.permute(isometry, (1, 0)).reshape(-1, *core.shape[1:]),
    )


def schmidt_values(xp: Backend, cores: Sequence[Array], current: int | None, bond: int) -> Array:
    """Return the Schmidt values across a bond, descending.

    They are the singular values of the operator with the legs left of the bond as rows and the
    legs right of it as columns.
    """
    centered = canonicalize(xp, cores, current, bond)[bond]
    check_finite(xp, centered)
    return xp.left_svd(centered.reshape(-1, centered.shape[-1]))[1]


def schmidt_split(xp: Backend, cores: Sequence[Array], bond: int) -> tuple[Array, Array, Array]:
    """Split a chain, canonical around the site left of a bond, into its Schmidt bases there.

    Returns
    -------
    array, shape (D, out, in, r)
        The core left of the bond, a left isometry.
    array, shape (r,)
        Schmidt values, descending.
    array, shape (r, out, in, D')
        The core right of the bond, a right isometry.
    """
    core, following = cores[bond], cores[bond + 1]
    unfolding = core.reshape(-1, core.shape[-1])
    check_finite(xp, unfolding)
    isometry, values = xp.left_svd(unfolding)
    # The rows of UᴴM = diag(values) Vᴴ are orthogonal up to rounding of the largest one. QR gives
    # orthonormal vectors for the smallest ones, too; R is diagonal up to rounding.
    basis, rest = xp.qr(xp.adjoint(xp.adjoint(isometry) @ unfolding))
    right = xp.adjoint(basis * _phases(xp, rest)) @ following.reshape(following.shape[0], -1)
    return (
        isometry.reshape(*core.shape[:-1], -1),
        values,
        right.reshape(-1, *following.shape[1:]),
    )


def _phases(xp: Backend, matrix: Array) -> Array:
    """Return the phases of the diagonal of a square matrix, 1 for zeros."""
    diagonal = xp.to_numpy(matrix).diagonal()
    sizes = np.abs(diagonal)
    phases = np.where(sizes > 0, diagonal / np.where(sizes > 0, sizes, 1), 1)
    return xp.from_numpy(phases, like=matrix)
