"""Matrix → MPO: a two-sided sweep of truncated decompositions into the central core."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, prod
from typing import Literal, overload

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES, COMPUTE_DTYPE, REAL_DTYPES, WIDE_DTYPE
from tnmoe.errors import InputError
from tnmoe.mpo import MPO, check_center
from tnmoe.shapes import MPOShape
from tnmoe.truncation import ErrorBudget, TruncationInfo, check_rtol

METHODS = ("auto", "svd", "eigh")

# An unfolding this many times wider than tall is first reduced to a small square one.
_WIDE = 2
# Columns of an unfolding are widened to double precision this many numbers at a time.
_GRAM_BLOCK = 1 << 22


@overload
def decompose(
    matrix: Array,
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = ...,
    rtol: float | None = ...,
    center: int | None = ...,
    method: str = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def decompose(
    matrix: Array,
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = ...,
    rtol: float | None = ...,
    center: int | None = ...,
    method: str = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def decompose(
    matrix: Array,
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = None,
    rtol: float | None = None,
    center: int | None = None,
    method: str = "auto",
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Decompose a matrix into an MPO, exactly or truncated.

    Truncated decompositions sweep from both ends into the centre, each pushing its singular
    values forward, so the centre ends up holding all the weight and every other core is an
    isometry: TT-SVD (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), algorithm 1) met in the
    middle.

    Parameters
    ----------
    matrix : array, shape (out_features, in_features)
        NumPy array or torch tensor, floating-point or complex. Half precisions are computed in
        float32.
    shape : MPOShape
        Legs of the MPO.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    rtol : float, optional
        Guaranteed relative Frobenius error of the whole (up to rounding in the matrix's dtype);
        every bond is as small as its even share of it allows. Where ``max_bond`` is smaller
        still, ``max_bond`` wins.
    center : int, optional
        Site of the orthogonality centre; by default ``shape.center``.
    method : {"auto", "svd", "eigh"}
        ``svd`` decomposes every unfolding, after a QR where it is much wider than tall. ``eigh``
        diagonalises its Gram matrix, accumulated in double precision: faster, and for single
        precision as accurate. ``auto`` takes ``eigh`` for wide unfoldings in single precision
        and ``svd`` otherwise.
    return_info : bool
        Also return what was cut.

    Returns
    -------
    MPO
        In canonical form around ``center``, with the matrix's library, dtype and device. Without
        ``max_bond`` and ``rtol`` the bonds are exact: ``shape.bond_dims()``.
    TruncationInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the matrix is not of the shape's size, is not floating-point or complex, or holds NaN
        or infinity; if an argument is out of range.
    TypeError
        If the matrix belongs to no supported library.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = np.arange(64.0).reshape(8, 8)
    >>> mpo, info = decompose(matrix, MPOShape((2, 2, 2), (2, 2, 2)), rtol=1e-10, return_info=True)
    >>> mpo.bond_dims
    (2, 2)
    >>> bool(np.allclose(mpo.to_matrix(), matrix))
    True
    """
    xp = get_backend(matrix)
    name = _check_matrix(xp, matrix, shape)
    caps = shape.bond_dims(max_bond)
    check_rtol(rtol)
    center = check_center(shape, center)
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

    rest, scale = _interleave(xp, xp.astype(matrix, COMPUTE_DTYPE.get(name, name)), shape)
    budget = ErrorBudget(rtol, float(xp.to_numpy(xp.norm(rest))), shape.sites - 1)
    cores, info = _sweep(xp, rest, shape, caps, budget, center, method)
    cores[center] = cores[center] * scale
    info = TruncationInfo(
        tuple(cut * scale for cut in info.discarded),
        tuple(spectrum * scale for spectrum in info.spectra),
        info.methods,
    )
    mpo = MPO([xp.astype(core, name) for core in cores], shape, center)
    return (mpo, info) if return_info else mpo


def _check_matrix(xp: Backend, matrix: Array, shape: MPOShape) -> str:
    """Dtype name of a matrix that fits the shape; an InputError otherwise."""
    size = (shape.out_features, shape.in_features)
    if tuple(matrix.shape) != size:
        raise InputError(f"{shape} is for a {size} matrix, got one of shape {tuple(matrix.shape)}")
    name = xp.dtype_name(matrix)
    if name not in (*REAL_DTYPES, *COMPLEX_DTYPES):
        raise InputError(f"the matrix must be floating-point or complex, got dtype {name}")
    if not xp.all_finite(matrix):
        raise InputError(f"the {size} matrix contains NaN or infinity")
    return name


def _interleave(xp: Backend, matrix: Array, shape: MPOShape) -> tuple[Array, float]:
    """The matrix with axes (o₁, i₁, o₂, i₂, …), divided by a power of two; that power.

    The division brings the largest entry near 1, so that no square over- or underflows, and is
    exact.
    """
    largest = xp.max_abs(matrix)
    scale = 2.0 ** (frexp(largest)[1] - 1) if largest else 1.0
    padded = (shape.padded_out, shape.padded_in)
    matrix = matrix / scale
    if tuple(matrix.shape) != padded:
        matrix = xp.pad(matrix, *padded)
    axes = [axis for site in range(shape.sites) for axis in (site, shape.sites + site)]
    return xp.permute(matrix.reshape(*shape.out_dims, *shape.in_dims), axes), scale


def _sweep(
    xp: Backend,
    rest: Array,
    shape: MPOShape,
    caps: tuple[int, ...],
    budget: ErrorBudget,
    center: int,
    method: str,
) -> tuple[list[Array], TruncationInfo]:
    """Split off the cores left of the centre, then those right of it; the rest is the centre."""
    legs = list(zip(shape.out_dims, shape.in_dims, strict=True))
    cores: list[Array] = [None] * shape.sites
    cuts: dict[int, tuple[float, Array, str]] = {}
    bond_l = bond_r = 1
    for site in range(center):
        unfolding = rest.reshape(bond_l * prod(legs[site]), -1)
        isometry, rest, cuts[site] = _split(xp, unfolding, caps[site], budget, method)
        cores[site] = isometry.reshape(bond_l, *legs[site], -1)
        bond_l = isometry.shape[1]
    for site in range(shape.sites - 1, center, -1):
        # A = (Aᵀ)ᵀ: the transpose splits into U (Uᴴ Aᵀ), so A = (A Ū) Uᵀ with Uᵀ the right core.
        unfolding = xp.permute(rest.reshape(-1, prod(legs[site]) * bond_r), (1, 0))
        isometry, rest, cuts[site - 1] = _split(xp, unfolding, caps[site - 1], budget, method)
        rest = xp.permute(rest, (1, 0))
        cores[site] = xp.permute(isometry, (1, 0)).reshape(-1, *legs[site], bond_r)
        bond_r = isometry.shape[1]
    cores[center] = rest.reshape(bond_l, *legs[center], bond_r)
    ordered = [cuts[bond] for bond in sorted(cuts)]
    return cores, TruncationInfo(
        discarded=tuple(cut[0] for cut in ordered),
        spectra=tuple(cut[1] for cut in ordered),
        methods=tuple(cut[2] for cut in ordered),
    )


def _split(
    xp: Backend, unfolding: Array, cap: int, budget: ErrorBudget, method: str
) -> tuple[Array, Array, tuple[float, Array, str]]:
    """Truncated split A ≈ U (Uᴴ A) with U an isometry; also (discarded, spectrum, method)."""
    rows, columns = unfolding.shape
    wide = columns >= _WIDE * rows
    if method == "auto":
        method = "eigh" if wide and xp.dtype_name(unfolding) in WIDE_DTYPE else "svd"
    if method == "eigh":
        vectors, spectrum = _gram_eigh(xp, unfolding)
    elif wide:
        # A = (Q R)ᴴ has the left singular vectors and the singular values of Rᴴ.
        triangle = xp.qr(xp.permute(xp.conj(unfolding), (1, 0)))[1]
        vectors, spectrum = xp.left_svd(xp.permute(xp.conj(triangle), (1, 0)))
    else:
        vectors, spectrum = xp.left_svd(unfolding)
    rank, discarded = budget.choose_rank(xp.to_numpy(spectrum), cap)
    isometry = vectors[:, :rank]
    rest = xp.permute(xp.conj(isometry), (1, 0)) @ unfolding
    return isometry, rest, (discarded, spectrum, method)


def _gram_eigh(xp: Backend, unfolding: Array) -> tuple[Array, Array]:
    """Left singular vectors and singular values from the Gram matrix A Aᴴ in double precision.

    Squaring halves the digits: in double precision enough are left for a single-precision
    result, in single precision a value 10⁻⁴ of the largest would be 40 % wrong.
    """
    name = xp.dtype_name(unfolding)
    rows, columns = unfolding.shape
    step = max(1, _GRAM_BLOCK // rows)
    gram = None
    for start in range(0, columns, step):
        block = xp.astype(unfolding[:, start : start + step], WIDE_DTYPE.get(name, name))
        product = block @ xp.permute(xp.conj(block), (1, 0))
        gram = product if gram is None else gram + product
    values, vectors = xp.eigh(gram)
    keep = min(rows, columns)
    return xp.astype(vectors[:, :keep], name), values[:keep].clip(0) ** 0.5
