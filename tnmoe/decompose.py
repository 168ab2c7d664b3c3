"""Matrix → MPO: a two-sided sweep of truncated decompositions into the central core."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPUTE_DTYPE
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.checks import KNOWN_DTYPES, check_dtype
from tnmoe.chains.interleave import interleave
from tnmoe.chains.moments import damped_moments
from tnmoe.chains.precision import check_range, computable, narrowed, widened
from tnmoe.chains.scaling import exponent_of
from tnmoe.chains.sweep import Sweep, SweepResult
from tnmoe.errors import InputError, check_generator, check_one_of
from tnmoe.mpo import MPO
from tnmoe.options import METHODS, Method
from tnmoe.shapes import MPOShape, resolve_center_site
from tnmoe.system.memory import explain_memory_error, in_gigabytes
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits
from tnmoe.weighted import decompose_weighted

# Entries within this many binary orders of magnitude of 1 can be squared and summed in any dtype.
_SAFE_EXPONENT = 30

# Measured memory of a decomposition, from least to most, as multiples of the matrix in the dtype of
# the computation.
_MEMORY = (1.5, 5)


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
    weights: Array | None = ...,
    damping: float = ...,
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
    weights: Array | None = ...,
    damping: float = ...,
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
    weights: Array | None = None,
    damping: float = 0.01,
    method: Method = "auto",
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Decompose a matrix into an MPO, exactly or truncated.

    Cores are split off from both ends, and each passes its singular values inwards. In the end the
    centre has the norm of the whole, and every other core is an isometry. This is TT-SVD
    (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), algorithm 1) from both ends to the middle.

    Parameters
    ----------
    matrix : array, shape (out_features, in_features)
        Of any supported library, floating-point or complex. Half precision is computed in
        float32.
    shape : MPOShape, optional
        Legs of the MPO; by default ``MPOShape.for_matrix(out_features, in_features)``.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond. Zeros fill bonds that the matrix does not need.
    rtol : float, optional
        Guaranteed relative Frobenius error of the whole (up to rounding in the matrix's dtype).
        The error is spent where it saves most parameters; see :func:`tnmoe.select_bonds`.
    max_params : int, optional
        Largest number of parameters of all cores together. The bonds are those of least predicted
        error within it.
    center_site : int, optional
        Site of the orthogonality centre; by default ``shape.center_site``.
    weights : array, shape (in_features, in_features), optional
        Second moments E[x xᴴ] of the inputs x that the matrix meets. The function then minimises
        the error of the outputs, E‖(W − MPO) x‖², and ``rtol`` limits its root relative to that of
        E‖W x‖².
    damping : float
        Share of the identity in the moments, whose mean eigenvalue is brought to 1 first. It keeps
        inputs that a short calibration did not show from being free.
    method : {"auto", "qr", "eigh", "svd", "randomized"}
        How to find isometries.

        - ``eigh`` diagonalises the Gram matrix of an unfolding, accumulated in double precision.
          It is fast, and for single precision as accurate as ``svd``. In double precision it
          cannot tell Schmidt values below 3e-8 of the norm from rounding. With a tolerance this
          small it keeps them, so that its bonds are larger than those of ``svd``.
        - ``svd`` takes the SVD of an unfolding's triangular factor.
        - ``qr`` finds no Schmidt values, and serves only where nothing is cut. Its isometries are
          identity matrices as long as the unfolding is wider than tall.
        - ``randomized`` finds the range of an unfolding by random projection with subspace
          iteration (Halko, Martinsson, Tropp, SIAM Rev. 53, 217 (2011), algorithms 4.3 and 4.4),
          and measures what it missed. It repeats that until the error is within the tolerance or
          no longer shrinks. It does not work with ``max_params``.
        - ``auto`` decides bond by bond: ``qr`` where nothing can be cut, otherwise ``eigh`` for
          single and half precision, and ``svd`` for double and while JAX traces a function.
    rng : numpy Generator or int
        Source of the randomized method's numbers.
    return_info : bool
        Also return what was cut. This computes the Schmidt values of bonds at which nothing is cut,
        too. It takes time, and changes no core.

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
        If the matrix belongs to no supported library, or ``shape`` is not an MPOShape.

    See Also
    --------
    decompose_batch : Many matrices of one shape together.
    decompose_shared : Many matrices, with cores in common.

    Notes
    -----
    Limits hold together. Where ``rtol`` needs larger bonds than ``max_bond`` or ``max_params``
    allow, the latter win.

    With ``weights`` the sweep goes over W R, where S = R Rᴴ are the damped moments, and R⁻¹ is
    multiplied into the cores afterwards. This keeps the bonds if all input legs stand at one site;
    with the legs (out | in) no MPO of the same bond is nearer (Eckart and Young, Psychometrika 1,
    211 (1936)). Otherwise R is the Kronecker product of such matrices for every site, from the
    marginals of S, and alternating least squares with the moments that remain improve the sweep.

    Beside the matrix it takes memory for one to two copies, and with ``rtol`` or the randomized
    method for three to four. Half precision is copied to float32 first, which doubles the number.

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
    shape = check_matrix(matrix, shape, axes=2)
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    if weights is None:
        ((mpo, info),) = _decompose_all(matrix, limits, center_site, method, rng, return_info)
    else:
        xp, center_site = get_backend(matrix), resolve_center_site(shape, center_site)
        rng = check_generator(rng)

        def sweep(whitened: Array, within: Limits) -> tuple[MPO, TruncationInfo]:
            return _decompose_all(whitened, within, center_site, method, rng, return_info)[0]

        with xp.full_precision(matrix):
            moments = damped_moments(xp, weights, matrix, damping)
            mpo, info = decompose_weighted(matrix, moments, limits, center_site, sweep)
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
        All have the bonds that the most demanding matrix needs.
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
    shape = check_matrix(matrices, shape, axes=3)
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    results = _decompose_all(matrices, limits, center_site, method, rng, return_info)
    mpos, infos = zip(*results, strict=True)
    return (mpos, infos) if return_info else mpos


def _decompose_all(
    matrices: Array,
    limits: Limits,
    center_site: int | None,
    method: Method,
    rng: np.random.Generator | int,
    with_spectra: bool,
) -> list[tuple[MPO, TruncationInfo]]:
    """Decompose a matrix or a batch of them, whose shape is checked."""
    xp, shape = get_backend(matrices), limits.shape
    center_site = resolve_center_site(shape, center_site)
    check_one_of("method", method, METHODS)
    dtype = xp.dtype_name(matrices)
    with explain_memory_error(_memory_in_words(xp, matrices)), xp.full_precision(matrices):
        sweep_center = _sweep_center(shape, center_site)
        tensor, scales = _to_tensor(xp, matrices, shape, sweep_center)
        sweep = Sweep(
            xp=xp,
            tensor=tensor,
            legs=shape.legs,
            center_site=sweep_center,
            limits=limits,
            method=method,
            rng=check_generator(rng),
            with_spectra=with_spectra,
        )
        del tensor  # so that the sweep can free it once it has a smaller one
        result = sweep.run()
        return [
            (
                _mpo_of(result, index, scale, shape, center_site, dtype),
                _info_of(result, index, scale),
            )
            for index, scale in enumerate(scales)
        ]


def _memory_in_words(xp: Backend, matrices: Array) -> str:
    """Say how much memory a decomposition takes."""
    dtype = xp.dtype_name(matrices)
    size = prod(matrices.shape) * np.dtype(COMPUTE_DTYPE.get(dtype, dtype)).itemsize
    *batch, rows, columns = matrices.shape
    what = f"{batch[0]} matrices" if batch else "a matrix"
    least, most = (in_gigabytes(multiple * size) for multiple in _MEMORY)
    return f"decomposing {what} ({rows}, {columns}) of {dtype} takes {least} to {most}"


def check_matrix(matrix: Array, shape: MPOShape | None, axes: int) -> MPOShape:
    """Return the shape, by default a balanced one; raise unless it fits a matrix or a batch."""
    xp, size = get_backend(matrix), tuple(matrix.shape)
    check_is_shape(shape)
    if len(size) != axes or 0 in size:
        expected = {
            2: "a matrix (decompose_batch takes many)",
            3: "a batch of matrices (decompose takes one)",
        }[axes]
        raise InputError(f"expected {expected}, got an array of shape {size}")
    shape = check_fits(shape, size[-2:])
    check_dtype(xp, matrix, f"the matrix must be of {KNOWN_DTYPES}")
    return shape


def check_is_shape(shape: MPOShape | None) -> None:
    """Raise a TypeError if a shape is given that is none."""
    if shape is not None and not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape, got {type(shape).__qualname__}: {shape!r}")


def check_fits(shape: MPOShape | None, size: tuple[int, ...]) -> MPOShape:
    """Return the shape, by default a balanced one; raise unless it is for a matrix of a size."""
    shape = MPOShape.for_matrix(*size) if shape is None else shape
    expected_size = (shape.out_features, shape.in_features)
    if size != expected_size:
        raise InputError(f"{shape} is for a {expected_size} matrix, got one of shape {size}")
    return shape


def _sweep_center(shape: MPOShape, center_site: int) -> int:
    """Return the site nearest to ``center_site`` where no unfolding is taller than wide."""
    left = list(accumulate(shape.legs, mul))
    fits = [
        site
        for site in range(shape.sites)
        if (site == 0 or left[site - 1] ** 2 <= left[-1]) and left[site] ** 2 >= left[-1]
    ]
    return min(fits, key=lambda site: abs(site - center_site))


def _to_tensor(
    xp: Backend, matrices: Array, shape: MPOShape, center_site: int
) -> tuple[Array, list[float]]:
    """Return matrices as a sweep takes them, and the powers of two that they were divided by."""
    computed = computable(xp, matrices)
    size = (shape.out_features, shape.in_features)
    exponents = [
        exponent_of(xp, matrix, _SAFE_EXPONENT, f"the {size} matrix contains")
        for matrix in (computed if computed.ndim == 3 else [computed])
    ]
    scales = [2.0**exponent for exponent in exponents]
    if any(exponents):
        divisors = np.reshape(scales, (-1, 1, 1) if computed.ndim == 3 else ())
        computed = computed / xp.from_numpy(divisors, like=computed)
    return interleave(xp, computed, shape, center_site), scales


def _mpo_of(
    result: SweepResult, index: int, scale: float, shape: MPOShape, center_site: int, dtype: str
) -> MPO:
    """Return one matrix of the batch as an MPO."""
    xp = get_backend(result.cores[0])
    legs = zip(shape.out_dims, shape.in_dims, strict=True)
    cores = [
        core.reshape(core.shape[0], *leg, core.shape[-1])
        for core, leg in zip((_pick(core, index, 3) for core in result.cores), legs, strict=True)
    ]
    cores = list(canonicalize(xp, cores, result.center_site, center_site))
    if scale != 1:
        check_range(xp, cores[center_site], dtype, scale)
    # Also by 1: the core may be a view of the matrix, which its owner may write to.
    cores[center_site] = cores[center_site] * scale
    return MPO(narrowed(xp, cores, dtype), shape, center_site)


def _info_of(result: SweepResult, index: int, scale: float) -> TruncationInfo:
    """Return what was cut of one matrix of the batch."""
    xp = get_backend(result.cores[0])
    spectra = [_pick(cut.spectrum, index, 1) for cut in result.cuts if cut.spectrum is not None]
    return TruncationInfo(
        discarded=tuple(float(cut.discarded[index]) * scale for cut in result.cuts),
        spectra=tuple(widened(xp, values) * scale for values in spectra),
        methods=tuple(cut.method for cut in result.cuts),
    )


def _pick(array: Array, index: int, ndim: int) -> Array:
    """Return one of a batch; an array without a batch axis is common to all."""
    return array[index] if array.ndim > ndim else array
