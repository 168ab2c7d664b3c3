"""Matrix → MPO: a two-sided sweep of truncated decompositions into the central core."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import frexp, isfinite, prod
from operator import mul
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES, COMPUTE_DTYPE, REAL_DTYPES
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.precision import check_range, computable, narrowed
from tnmoe.chains.sweep import Sweep
from tnmoe.errors import InputError, generator_of, one_of
from tnmoe.mpo import MPO, check_center_site
from tnmoe.options import METHODS, Method
from tnmoe.shapes import MPOShape
from tnmoe.system.memory import explain_memory_error, in_gigabytes
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits

# Entries between these can be squared and summed in every dtype as they are.
_SAFE = (2.0**-30, 2.0**30)

# Measured memory of a decomposition, as multiples of the matrix in the dtype of the computation.
_LEAST, _MOST = 1.5, 5


@overload
def decompose(
    matrix: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    method: Method = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def decompose(
    matrix: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    method: Method = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def decompose(
    matrix: Array,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    center_site: int | None = None,
    method: Method = "auto",
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Decompose a matrix into an MPO, exactly or truncated.

    Cores are split off from both ends, each pushing its singular values inwards, so the centre
    ends up holding all the weight and every other core is an isometry: TT-SVD (Oseledets, SIAM
    J. Sci. Comput. 33, 2295 (2011), algorithm 1) met in the middle.

    Parameters
    ----------
    matrix : array, shape (out_features, in_features)
        NumPy array or torch tensor, floating-point or complex. Half precisions are computed in
        float32.
    shape : MPOShape, optional
        Legs of the MPO; by default ``MPOShape.for_matrix(out_features, in_features)``.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond; zeros fill up what the matrix does not need.
    rtol : float, optional
        Guaranteed relative Frobenius error of the whole (up to rounding in the matrix's dtype).
        The error is spent where it saves most parameters; see :func:`tnmoe.select_bonds`.
    max_params : int, optional
        Most numbers that all cores may hold together; the bonds of least predicted error within
        it are taken.
    center_site : int, optional
        Site of the orthogonality centre; by default ``shape.center_site``.
    method : {"auto", "qr", "eigh", "svd", "randomized"}
        How isometries are found. ``eigh`` diagonalises the Gram matrix of an unfolding, accumulated
        in double precision: fast, and for single precision as accurate as ``svd``, which takes the
        SVD of the unfolding's triangular factor. For double precision it takes Schmidt values below
        3e-8 of the norm for rounding and cuts none that a tolerance as small forbids: bonds are
        then larger than those of ``svd``. ``qr`` finds no Schmidt values and only serves
        where nothing is cut; its isometries are identity matrices as long as the unfolding is wider
        than tall. ``randomized`` finds the range of an unfolding by random projection with subspace
        iteration (Halko, Martinsson, Tropp, SIAM Rev. 53, 217 (2011), algorithms 4.3 and 4.4),
        measures what it missed, and is repeated until that is within the tolerance or no longer
        shrinks; it knows no ``max_params``. ``auto`` takes, bond by bond, ``qr`` where nothing can
        be cut, otherwise ``eigh`` for single and half precision and ``svd`` for double.
    rng : numpy Generator or int
        Source of the randomized method's numbers.
    return_info : bool
        Also return what was cut. The Schmidt values of bonds at which nothing is cut are then
        computed as well, which costs time but changes no core.

    Returns
    -------
    MPO
        In canonical form around ``center_site``, with the matrix's library, dtype and device.
        Without any limit the bonds are exact: ``shape.bond_dims()``.
    TruncationInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the matrix is not of the shape's size, is not floating-point or complex, or holds NaN
        or infinity; if an argument is out of range or contradicts another.
    TypeError
        If the matrix belongs to no supported library, or ``shape`` is no MPOShape.

    See Also
    --------
    decompose_batch : Many matrices of one shape together.

    Notes
    -----
    Limits hold together: where ``rtol`` asks for more than ``max_bond`` or ``max_params`` allow,
    the latter win.

    Beside the matrix it takes memory for one to two copies, three to four with ``rtol`` or the
    randomized method; half precision is copied to float32 first, and takes twice as many.

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
    shape = _check_matrix(matrix, shape, axes=2)
    selection = Limits(shape, max_bond, bonds, rtol, max_params)
    ((mpo, info),) = _decomposed(matrix, selection, center_site, method, rng, return_info)
    return (mpo, info) if return_info else mpo


@overload
def decompose_batch(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    method: Method = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> tuple[MPO, ...]: ...


@overload
def decompose_batch(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    method: Method = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[tuple[MPO, ...], tuple[TruncationInfo, ...]]: ...


def decompose_batch(
    matrices: Array,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    center_site: int | None = None,
    method: Method = "auto",
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> tuple[MPO, ...] | tuple[tuple[MPO, ...], tuple[TruncationInfo, ...]]:
    """Decompose many matrices of one shape together, into MPOs of the same bonds.

    Parameters
    ----------
    matrices : array, shape (B, out_features, in_features)
        At least one matrix.
    shape, max_bond, bonds, rtol, max_params, center_site, method, rng, return_info
        As for :func:`decompose`; limits hold for every matrix.

    Returns
    -------
    tuple of B MPO
        Their bonds are those that the most demanding matrix needs.
    tuple of B TruncationInfo
        Only with ``return_info``.

    Raises
    ------
    InputError, TypeError
        As for :func:`decompose`.

    Examples
    --------
    >>> import numpy as np
    >>> matrices = np.stack([np.eye(8), np.ones((8, 8))])
    >>> mpos = decompose_batch(matrices, MPOShape((2, 2, 2), (2, 2, 2)), rtol=1e-10)
    >>> [mpo.bond_dims for mpo in mpos]
    [(1, 1), (1, 1)]
    """
    shape = _check_matrix(matrices, shape, axes=3)
    selection = Limits(shape, max_bond, bonds, rtol, max_params)
    results = _decomposed(matrices, selection, center_site, method, rng, return_info)
    mpos, infos = zip(*results, strict=True)
    return (mpos, infos) if return_info else mpos


def _decomposed(
    matrices: Array,
    selection: Limits,
    center_site: int | None,
    method: Method,
    rng: np.random.Generator | int,
    want_spectra: bool,
) -> list[tuple[MPO, TruncationInfo]]:
    """One matrix or a batch of them, checked."""
    xp, shape = get_backend(matrices), selection.shape
    center_site = check_center_site(shape, center_site)
    one_of("method", method, METHODS)
    dtype = xp.dtype_name(matrices)
    with explain_memory_error(_need(xp, matrices)), xp.full_precision(matrices):
        sweep_center = _sweep_center(shape, center_site)
        tensor, scales = _tensor(xp, matrices, shape, sweep_center)
        rng = generator_of(rng)
        sweep = Sweep(xp, tensor, shape.legs, sweep_center, selection, method, rng, want_spectra)
        del tensor  # so that the sweep can let it go when it has a smaller one
        sweep.run()
        return [
            _result(xp, sweep, index, scale, dtype, center_site)
            for index, scale in enumerate(scales)
        ]


def _need(xp: Backend, matrices: Array) -> str:
    """What memory a decomposition takes, in words."""
    dtype = xp.dtype_name(matrices)
    size = prod(matrices.shape) * np.dtype(COMPUTE_DTYPE.get(dtype, dtype)).itemsize
    *batch, rows, columns = matrices.shape
    what = f"{batch[0]} matrices" if batch else "a matrix"
    return (
        f"decomposing {what} ({rows}, {columns}) of {dtype} takes "
        f"{in_gigabytes(_LEAST * size)} to {in_gigabytes(_MOST * size)}"
    )


def _check_matrix(matrix: Array, shape: MPOShape | None, axes: int) -> MPOShape:
    """The shape, or the usual one, for a matrix or a batch of them that fits it; or an error."""
    xp, given = get_backend(matrix), tuple(matrix.shape)
    name, known = xp.dtype_name(matrix), (*REAL_DTYPES, *COMPLEX_DTYPES)
    if shape is not None and not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape, got {type(shape).__qualname__}: {shape!r}")
    if len(given) != axes or 0 in given:
        expected = {
            2: "a matrix (decompose_batch takes many)",
            3: "a batch of matrices (decompose takes one)",
        }[axes]
        raise InputError(f"expected {expected}, got an array of shape {given}")
    shape = MPOShape.for_matrix(*given[-2:]) if shape is None else shape
    size = (shape.out_features, shape.in_features)
    if given[-2:] != size:
        raise InputError(f"{shape} is for a {size} matrix, got one of shape {given[-2:]}")
    if name not in known:
        raise InputError(f"the matrix must be of {', '.join(known)}, got dtype {name}")
    return shape


def _tensor(
    xp: Backend, matrices: Array, shape: MPOShape, center_site: int
) -> tuple[Array, list[float]]:
    """Matrices as a sweep takes them, and the scales that they were divided by."""
    computed = computable(xp, matrices)
    scales = _scales(xp, computed, shape)
    return _interleave(xp, computed, shape, scales, center_site), scales


def _scales(xp: Backend, matrix: Array, shape: MPOShape) -> list[float]:
    """Per matrix the power of two that brings its largest entry near 1; 1 where it is near.

    Dividing by it is exact, and then no square over- or underflows.
    """
    scales = []
    for one in matrix if matrix.ndim == 3 else [matrix]:
        largest = xp.max_abs(one)
        if not isfinite(largest):
            size = (shape.out_features, shape.in_features)
            raise InputError(f"the {size} matrix contains NaN or infinity")
        near_one = not largest or _SAFE[0] < largest < _SAFE[1]
        scales.append(1.0 if near_one else 2.0 ** (frexp(largest)[1] - 1))
    return scales


def _interleave(
    xp: Backend, matrix: Array, shape: MPOShape, scales: Sequence[float], center_site: int
) -> Array:
    """Divide the matrix by its scale; axes (..., left legs, those of the centre, right legs)."""
    if any(scale != 1 for scale in scales):
        divisors = np.reshape(scales, (-1, 1, 1) if matrix.ndim == 3 else ())
        matrix = matrix / xp.from_numpy(divisors, like=matrix)
    padded = (shape.padded_out, shape.padded_in)
    if tuple(matrix.shape[-2:]) != padded:
        matrix = xp.pad(matrix, *padded)
    batch = matrix.shape[:-2]
    # Legs of size 1 are left out: libraries limit the number of axes.
    sides = (enumerate(dims) for dims in (shape.out_dims, shape.in_dims))
    legs = [(site, size) for side in sides for site, size in side if size > 1]
    axes = sorted(range(len(legs)), key=lambda axis: legs[axis][0])
    tensor = xp.permute(
        matrix.reshape((*batch, *(size for _, size in legs))),
        [*range(len(batch)), *(len(batch) + axis for axis in axes)],
    )
    left, right = prod(shape.legs[:center_site]), prod(shape.legs[center_site + 1 :])
    return tensor.reshape(*batch, left, shape.legs[center_site], right)


def _sweep_center(shape: MPOShape, wanted: int) -> int:
    """Site to sweep into, so that no unfolding is taller than wide; the nearest to the wanted."""
    left = list(accumulate(shape.legs, mul))
    fits = [
        site
        for site in range(shape.sites)
        if (site == 0 or left[site - 1] ** 2 <= left[-1]) and left[site] ** 2 >= left[-1]
    ]
    return min(fits, key=lambda site: abs(site - wanted))


def _result(
    xp: Backend, sweep: Sweep, index: int, scale: float, dtype: str, center_site: int
) -> tuple[MPO, TruncationInfo]:
    """One matrix of the batch, out of a finished sweep."""
    shape = sweep.selection.shape
    cores = {site: _pick(core, index, 3) for site, core in sweep.cores.items()}
    cores[sweep.center_site] = _pick(sweep.tensor, index, 3)
    legs = zip(shape.out_dims, shape.in_dims, strict=True)
    chain = [
        cores[site].reshape(cores[site].shape[0], *leg, cores[site].shape[-1])
        for site, leg in enumerate(legs)
    ]
    moved = list(canonicalize(xp, chain, sweep.center_site, center_site))
    if scale != 1:
        check_range(xp, moved[center_site], dtype, scale)
    # Also by 1: the core may be a view of the matrix, which its owner may write to.
    moved[center_site] = moved[center_site] * scale
    cuts = [sweep.cuts[bond] for bond in sorted(sweep.cuts)]
    spectra = [_pick(cut.spectrum, index, 1) for cut in cuts if cut.spectrum is not None]
    info = TruncationInfo(
        discarded=tuple(float(cut.discarded[index]) * scale for cut in cuts),
        spectra=tuple(xp.astype(values, "float64") * scale for values in spectra),
        methods=tuple(cut.method for cut in cuts),
    )
    return MPO(narrowed(xp, moved, dtype), shape, center_site), info


def _pick(array: Array, index: int, ndim: int) -> Array:
    """One of a batch; an array without a batch axis is common to all."""
    return array[index] if array.ndim > ndim else array
