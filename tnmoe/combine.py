"""Sums and products of operators, rounded as they are formed, and Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.chains import algebra
from tnmoe.chains.precision import all_widened, computable, narrowed
from tnmoe.chains.scaling import normalized_chains, times_power
from tnmoe.chains.sketch import project_terms
from tnmoe.chains.terms import EntrywiseTerm, Term, distance, squared_norm
from tnmoe.chains.zip_up import zip_up
from tnmoe.errors import InputError, check_generator, check_one_of
from tnmoe.mpo import MPO, check_alike, check_operands, round_mpo
from tnmoe.options import ADD_METHODS, PRODUCT_METHODS, AddMethod, ProductMethod
from tnmoe.shapes import MPOShape, is_padded
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits

# Part of the tolerance for the last rounding, after a product or projection was approximated.
_ROUNDING_PART = 0.9


@overload
def add(
    mpos: Sequence[MPO],
    *,
    method: AddMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def add(
    mpos: Sequence[MPO],
    *,
    method: AddMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def add(
    mpos: Sequence[MPO],
    *,
    method: AddMethod = "direct",
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Add operators and round the sum.

    Parameters
    ----------
    mpos : sequence of MPO
        At least one; all of one shape, library and dtype.
    method : {"direct", "successive", "randomized"}
        ``direct`` forms the sum, whose bonds add up, and rounds it once. It is the most accurate
        method: its error is within ``rtol`` and quasi-optimal for the bonds. ``successive`` adds
        one operator after the other and rounds every time, so that bonds stay small. The errors of
        its roundings add up, within ``rtol`` in all. With ``max_bond`` alone, no later rounding
        recovers what an early one lost. ``randomized`` contracts the operators with random ones
        and never forms the sum (Al Daas et al., SIAM J. Sci. Comput. 45, A74 (2023), algorithm
        3.2). With ``max_bond`` its error is a small factor above the optimum with high probability.
        With ``rtol`` it measures the error, and enlarges the projection until the tolerance holds.
    max_bond, bonds, rtol, max_params
        As for :meth:`MPO.compress`; ``randomized`` needs one of the first three.
    rng : numpy Generator or int
        Source of random numbers.
    return_info : bool
        Also return what was cut. ``randomized`` then measures the error of its projection, as a
        difference of norms in double precision: below 1e-8 of the norm it is rounding.

    Returns
    -------
    MPO
        In canonical form around ``shape.center_site``.
    TruncationInfo
        Only with ``return_info``. It describes the last rounding; its ``error_bound`` holds for
        the whole sum.

    Raises
    ------
    InputError
        If the operators do not fit together, the method is unknown, or it needs a limit.

    Examples
    --------
    >>> one = MPO.identity(MPOShape((2, 2), (2, 2)))
    >>> total, info = add([one, one, one], max_bond=1, return_info=True)
    >>> round(total.trace().item(), 6), info.error_bound < 1e-9
    (12.0, True)
    """
    mpos = list(mpos)
    if not mpos:
        raise InputError("a sum needs at least one operator, got none")
    first = mpos[0]
    for mpo in mpos:
        check_alike(first, mpo, "a sum")
    limits = Limits(first.shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    check_one_of("method", method, ADD_METHODS)
    with get_backend(first.cores[0]).full_precision(first.cores[0]):
        if method == "randomized":
            mpo, info = _randomized_sum(mpos, limits, check_generator(rng), return_info)
        elif method == "successive":
            mpo, info = _successive_sum(mpos, limits)
        else:
            mpo, info = _direct_sum(mpos, limits)
    return (mpo, info) if return_info else mpo


@overload
def matmul(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def matmul(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def matmul(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = "direct",
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Multiply operators and round the product ``a @ b``.

    Parameters
    ----------
    a, b : MPO
        The input legs of ``a`` must be the output legs of ``b``.
    method : {"direct", "zipup", "randomized"}
        ``direct`` forms the product, whose bonds multiply, and rounds it. Its error is within
        ``rtol`` and quasi-optimal for the bonds. ``zipup`` truncates while it multiplies, site by
        site, to twice the bonds or a tenth of the tolerance, and rounds afterwards (Stoudenmire,
        White, New J. Phys. 12, 055026 (2010), section 2.3). It is far cheaper for large bonds, and
        usually as accurate, but has no error bound: the part not yet multiplied is not orthogonal.
        ``randomized`` as for :func:`add`.
    max_bond, bonds, rtol, max_params
        As for :meth:`MPO.compress`; ``randomized`` needs one of the first three.
    rng : numpy Generator or int
        Source of random numbers.
    return_info : bool
        Also return what was cut. ``zipup`` and ``randomized`` then measure the error that they
        made before the last rounding, as for :func:`add`. For large bonds that costs more than the
        product.

    Returns
    -------
    MPO
        In canonical form around its ``shape.center_site``.
    TruncationInfo
        Only with ``return_info``. It describes the last rounding; its ``error_bound`` holds for
        the whole product.

    Raises
    ------
    InputError
        If the operators do not fit together, the method is unknown, or it needs a limit.

    Examples
    --------
    >>> a = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=2, rng=0)
    >>> product = matmul(a, a, rtol=1e-10)
    >>> bool(np.allclose(product.to_matrix(), a.to_matrix() @ a.to_matrix()))
    True
    """
    check_one_of("method", method, PRODUCT_METHODS)
    check_operands(a, b)
    shape, xp = algebra.product_shape(a.shape, b.shape), get_backend(a.cores[0])
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    with xp.full_precision(a.cores[0]):
        term = Term(algebra.product_factors(xp, a.shape, a.cores, b.cores))
        mpo, info = _rounded_product(term, limits, method, check_generator(rng), return_info)
        mpo = _narrowed_like(a, mpo)
    return (mpo, info) if return_info else mpo


@overload
def hadamard(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def hadamard(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = ...,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    rng: np.random.Generator | int = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def hadamard(
    a: MPO,
    b: MPO,
    *,
    method: ProductMethod = "direct",
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Multiply operators entry by entry and round the Hadamard product.

    Parameters
    ----------
    a, b : MPO
        Of one shape, library and dtype.
    method : {"direct", "zipup", "randomized"}
        As for :func:`matmul`. The bonds of ``direct``, which forms the product, multiply.
    max_bond, bonds, rtol, max_params
        As for :meth:`MPO.compress`; ``randomized`` needs one of the first three.
    rng : numpy Generator or int
        Source of random numbers.
    return_info : bool
        Also return what was cut, as for :func:`matmul`.

    Returns
    -------
    MPO
        In canonical form around its ``shape.center_site``.
    TruncationInfo
        Only with ``return_info``. It describes the last rounding; its ``error_bound`` holds for
        the whole product.

    Raises
    ------
    InputError
        If the operators do not fit together, the method is unknown, or it needs a limit.

    See Also
    --------
    MPO.hadamard : The product as it is, without rounding.

    Examples
    --------
    >>> a = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), max_bond=2, rng=0)
    >>> square = hadamard(a, a, rtol=1e-10)
    >>> bool(np.allclose(square.to_matrix(), a.to_matrix() ** 2))
    True
    """
    check_one_of("method", method, PRODUCT_METHODS)
    check_alike(a, b, "an entrywise product")
    xp, shape = get_backend(a.cores[0]), a.shape
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    with xp.full_precision(a.cores[0]):
        term = EntrywiseTerm(tuple([computable(xp, core) for core in x.cores] for x in (a, b)))
        mpo, info = _rounded_product(term, limits, method, check_generator(rng), return_info)
        mpo = _narrowed_like(a, mpo)
    return (mpo, info) if return_info else mpo


def kron(a: MPO, b: MPO) -> MPO:
    """Form the Kronecker product: the sites of ``a`` followed by those of ``b``.

    Parameters
    ----------
    a, b : MPO
        Of one library and dtype.

    Raises
    ------
    InputError
        If dtypes differ, or the shape of ``b`` is padded: its padding would end up inside.
    TypeError
        If ``b`` is not an MPO, or belongs to another library.

    Examples
    --------
    >>> one = MPO.identity(MPOShape((2,), (2,)))
    >>> kron(one, 3 * one).to_matrix().diagonal()
    array([3., 3., 3., 3.])
    """
    check_operands(a, b)
    left, right = a.shape, b.shape
    if is_padded(right):
        raise InputError(f"the second factor of kron must not be padded, got {right}")
    shape = MPOShape(
        left.out_dims + right.out_dims,
        left.in_dims + right.in_dims,
        left.out_features * right.out_features,
        left.in_features * right.in_features,
    )
    return MPO(a.cores + b.cores, shape)


def _direct_sum(mpos: Sequence[MPO], limits: Limits) -> tuple[MPO, TruncationInfo]:
    xp = get_backend(mpos[0].cores[0])
    return round_mpo(MPO(algebra.add(xp, [mpo.cores for mpo in mpos]), limits.shape), limits)


def _randomized_sum(
    mpos: Sequence[MPO], limits: Limits, rng: np.random.Generator, measure: bool
) -> tuple[MPO, TruncationInfo]:
    xp = get_backend(mpos[0].cores[0])
    terms, exponent = _terms(mpos)
    projected = project_terms(xp, terms, limits, rng)
    if projected is None:
        return _direct_sum(mpos, limits)
    missed = distance(xp, terms, projected) if measure else 0.0
    mpo, info = _finish(projected, exponent, limits, missed)
    return _narrowed_like(mpos[0], mpo), info


def _terms(mpos: Sequence[MPO]) -> tuple[list[Term], int]:
    """Return the operators as terms in double precision, divided by a power of two."""
    xp = get_backend(mpos[0].cores[0])
    # In double precision an error can be measured as a difference of norms.
    wide = all_widened(xp, [core for mpo in mpos for core in mpo.cores])
    sites = mpos[0].shape.sites
    chains, exponent = normalized_chains(
        xp, [wide[start : start + sites] for start in range(0, len(wide), sites)]
    )
    return [Term((chain,)) for chain in chains], exponent


def _rounded_product(
    term: Term, limits: Limits, method: ProductMethod, rng: np.random.Generator, measure: bool
) -> tuple[MPO, TruncationInfo]:
    """Form the product of two chains and round it, or approximate it while it is formed."""
    xp = get_backend(term.chains[0][0])
    if method == "direct":
        return round_mpo(MPO(term.form(xp), limits.shape), limits)
    scaled = [normalized_chains(xp, [chain]) for chain in term.chains]
    narrow = replace(term, chains=tuple(chain for (chain,), _ in scaled))
    exponent = sum(exponent for _, exponent in scaled)
    left, right = narrow.chains
    wide_cores = all_widened(xp, [*left, *right])
    wide = replace(narrow, chains=(wide_cores[: len(left)], wide_cores[len(left) :]))
    if method == "zipup":
        found: list[Array] | None = zip_up(xp, narrow, limits)
    else:
        found = project_terms(xp, [wide], limits, rng)
    if found is None:
        return round_mpo(MPO(term.form(xp), limits.shape), limits)
    missed = distance(xp, [wide], found) if measure else 0.0
    return _finish(found, exponent, limits, missed)


def _successive_sum(mpos: Sequence[MPO], limits: Limits) -> tuple[MPO, TruncationInfo]:
    """Round after every addition; the roundings share the tolerance."""
    if len(mpos) == 1:
        return round_mpo(mpos[0], limits)
    xp, allowed = get_backend(mpos[0].cores[0]), None
    if limits.rtol is not None:
        terms, exponent = _terms(mpos)
        norm = max(0.0, squared_norm(xp, terms)) ** 0.5
        allowed = float(np.ldexp(limits.rtol * norm / len(mpos), exponent))
    # Exact bonds are for the end: on the way a bond may not be that large yet.
    interim = Limits(limits.shape, max_bond=limits.caps)
    total, earlier_error = mpos[0], 0.0
    for position, mpo in enumerate(mpos[1:], start=2):
        total = total + mpo
        norm = 0.0 if allowed is None else float(xp.to_numpy(total.norm()))
        rtol = min(1.0, allowed / norm) if allowed is not None and norm else None
        step = replace(limits if position == len(mpos) else interim, rtol=rtol)
        total, info = round_mpo(total, step)
        info = replace(info, earlier_error=earlier_error)
        earlier_error = info.error_bound
    return total, info


def _finish(
    cores: Sequence[Array], exponent: int, limits: Limits, missed: float
) -> tuple[MPO, TruncationInfo]:
    """Round approximate cores times a power of two; ``missed`` is the error of the cores."""
    cores = [*cores[:-1], times_power(cores[-1], exponent)]
    rtol = None if limits.rtol is None else _ROUNDING_PART * limits.rtol
    mpo, info = round_mpo(
        MPO(cores, limits.shape, limits.shape.sites - 1), replace(limits, rtol=rtol)
    )
    return mpo, replace(info, earlier_error=float(np.ldexp(missed, exponent)))


def _narrowed_like(like: MPO, mpo: MPO) -> MPO:
    """Return an operator in the dtype of another one."""
    xp = get_backend(like.cores[0])
    name = xp.dtype_name(like.cores[0])
    return MPO(narrowed(xp, mpo.cores, name), mpo.shape, mpo.center_site)
