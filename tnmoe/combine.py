"""Sums and products of operators, rounded as they are formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains import algebra
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.precision import narrowed, widened
from tnmoe.chains.rounding import near_one, times_power, truncated_isometry
from tnmoe.contraction.einsum import contract
from tnmoe.errors import InputError, generator_of, one_of
from tnmoe.mpo import MPO, check_operands, product_factors
from tnmoe.options import ADD_METHODS, MATMUL_METHODS, AddMethod, MatmulMethod
from tnmoe.shapes import MPOShape
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits

# The random projections keep this many directions more than will be kept in the end.
_OVERSAMPLING = 10
_FIRST_GUESS = 16
# Below this relative error ‖W‖² − ‖result‖² is rounding, and cannot be measured.
_MEASURABLE = 1e-6


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
    """Sum of operators, rounded.

    Parameters
    ----------
    mpos : sequence of MPO
        At least one; all of one shape, library and dtype.
    method : {"direct", "successive", "randomized"}
        ``direct`` forms the sum, whose bonds add up, and rounds it once: the most accurate, its
        error within ``rtol`` and quasi-optimal for the bonds. ``successive`` adds one operator
        after the other and rounds every time, so that bonds stay small; the errors of the
        roundings add up, within ``rtol`` in all, but with ``max_bond`` alone what an early
        rounding loses is lost. ``randomized`` contracts the operators with random ones and never
        forms the sum (Al Daas et al., SIAM J. Sci. Comput. 45, A74 (2023), algorithm 3.2); with
        ``max_bond`` its error is a small factor above the optimum with high probability; with
        ``rtol`` it is measured, and the projection enlarged until the tolerance holds.
    max_bond, bonds, rtol, max_params
        As for :meth:`MPO.compress`; ``randomized`` needs one of the first three.
    rng : numpy Generator or int
        Source of random numbers.
    return_info : bool
        Also return what was cut. For ``randomized`` the error of the projection is then measured,
        as a difference of norms in double precision: below 1e-8 of the norm it is rounding.

    Returns
    -------
    MPO
        In canonical form around ``shape.center_site``.
    TruncationInfo
        Only with ``return_info``: of the last rounding. Its ``error_bound`` is for the whole sum.

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
    for other in mpos:
        check_operands(first, other)
        if other.shape != first.shape:
            raise InputError(f"cannot add {first.shape} and {other.shape}: they must be equal")
    selection = Limits(first.shape, max_bond, bonds, rtol, max_params)
    one_of("method", method, ADD_METHODS)
    xp = get_backend(first.cores[0])
    with xp.full_precision(first.cores[0]):
        if method == "randomized":
            mpo, info = _randomized_sum(mpos, selection, generator_of(rng), return_info)
        elif method == "successive":
            mpo, info = _successive(mpos, selection)
        else:
            mpo, info = _direct_sum(mpos, selection)
    return (mpo, info) if return_info else mpo


@overload
def matmul(
    a: MPO,
    b: MPO,
    *,
    method: MatmulMethod = ...,
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
    method: MatmulMethod = ...,
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
    method: MatmulMethod = "direct",
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    rng: np.random.Generator | int = 0,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Product ``a @ b`` of operators, rounded.

    Parameters
    ----------
    a, b : MPO
        The input legs of ``a`` are the output legs of ``b``.
    method : {"direct", "zipup", "randomized"}
        ``direct`` forms the product, whose bonds multiply, and rounds it: error within ``rtol``
        and quasi-optimal for the bonds. ``zipup`` truncates while it multiplies, site by site,
        to twice the bonds (or a tenth of the tolerance) and rounds afterwards (Stoudenmire,
        White, New J. Phys. 12, 055026 (2010), section 2.3): far cheaper for large bonds, and as
        a rule as accurate, but without a bound, because the part not yet multiplied is not
        orthogonal. ``randomized`` as for :func:`add`.
    max_bond, bonds, rtol, max_params
        As for :meth:`MPO.compress`; ``randomized`` needs one of the first three.
    rng : numpy Generator or int
        Source of random numbers.
    return_info : bool
        Also return what was cut. For ``zipup`` and ``randomized`` the error that was made before
        is then measured, as for :func:`add`, which for large bonds costs more than the product.

    Returns
    -------
    MPO
        In canonical form around its ``shape.center_site``.
    TruncationInfo
        Only with ``return_info``: of the last rounding. Its ``error_bound`` is for the whole
        product.

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
    one_of("method", method, MATMUL_METHODS)
    check_operands(a, b)
    xp = get_backend(a.cores[0])
    with xp.full_precision(a.cores[0]):
        shape, factors = product_factors(a, b)
        selection = Limits(shape, max_bond, bonds, rtol, max_params)
        if method == "direct":
            mpo, info = _compressed(MPO(algebra.compose(xp, *factors), shape), selection)
        else:
            rng = generator_of(rng)
            mpo, info = _product_as_formed(xp, factors, selection, method, rng, return_info)
        mpo = _as(a, mpo)
    return (mpo, info) if return_info else mpo


def _direct_sum(mpos: Sequence[MPO], selection: Limits) -> tuple[MPO, TruncationInfo]:
    xp = get_backend(mpos[0].cores[0])
    whole = MPO(algebra.add(xp, [mpo.cores for mpo in mpos]), mpos[0].shape)
    return _compressed(whole, selection)


def _randomized_sum(
    mpos: Sequence[MPO], selection: Limits, rng: np.random.Generator, measure: bool
) -> tuple[MPO, TruncationInfo]:
    xp = get_backend(mpos[0].cores[0])
    chains, exponent = near_one(xp, [_wide(xp, mpo.cores) for mpo in mpos])
    terms = [_Term((chain,)) for chain in chains]
    found = _randomized(xp, terms, selection, rng)
    if found is None:
        return _direct_sum(mpos, selection)
    missed = _distance(xp, terms, found) if measure else 0.0
    mpo, info = _finish(found, exponent, selection, missed)
    return _as(mpos[0], mpo), info


def _product_as_formed(
    xp: Backend,
    factors: tuple[Sequence[Array], Sequence[Array]],
    selection: Limits,
    method: MatmulMethod,
    rng: np.random.Generator,
    measure: bool,
) -> tuple[MPO, TruncationInfo]:
    """A product that is approximated while it is formed."""
    (left,), left_exponent = near_one(xp, [factors[0]])
    (right,), right_exponent = near_one(xp, [factors[1]])
    term = _Term((_wide(xp, left), _wide(xp, right)))
    if method == "zipup":
        found: list[Array] | None = _zip_up(xp, (left, right), selection)
    else:
        found = _randomized(xp, [term], selection, rng)
    if found is None:
        return _compressed(MPO(algebra.compose(xp, *factors), selection.shape), selection)
    missed = _distance(xp, [term], found) if measure else 0.0
    return _finish(found, left_exponent + right_exponent, selection, missed)


@dataclass(frozen=True)
class _Term:
    """A product of one or two chains, whose bonds are never merged into cores."""

    chains: tuple[Sequence[Array], ...]

    def bond(self, site: int) -> int:
        """Dimension of the bond left of a site."""
        return prod(chain[site].shape[0] for chain in self.chains)

    def absorb(self, xp: Backend, carry: Array, site: int) -> Array:
        """From (r, D) to (r, out, in, D'): the next site multiplied into what is left of it."""
        cores = [chain[site] for chain in self.chains]
        carry = carry.reshape(carry.shape[0], *(core.shape[0] for core in cores))
        equation = "ra,aoib->roib" if len(cores) == 1 else "rac,aoxb,cxid->roibd"
        merged = contract(xp, equation, carry, *cores)
        return merged.reshape(*merged.shape[:3], -1)

    def pull(self, xp: Backend, sketch: Array, probe: Array, site: int) -> Array:
        """From (D', m) to (D, l): one more site contracted with a random core (l, out, in, m)."""
        cores = [chain[site] for chain in self.chains]
        sketch = sketch.reshape(*(core.shape[3] for core in cores), sketch.shape[1])
        equation = "aoib,loim,bm->al" if len(cores) == 1 else "aoxb,cxid,loim,bdm->acl"
        pulled = contract(xp, equation, *cores, probe, sketch)
        return pulled.reshape(-1, pulled.shape[-1])


def _randomized(
    xp: Backend, terms: Sequence[_Term], selection: Limits, rng: np.random.Generator
) -> list[Array] | None:
    """Projection of a sum of terms onto random ranges; None where forming the sum is as cheap."""
    like = terms[0].chains[0][0]
    limited = selection.bonds is not None or selection.max_bond is not None
    if not limited and selection.rtol is None:
        raise InputError("method='randomized' needs max_bond, bonds or rtol")
    sites = selection.shape.sites
    full = [
        min(cap, sum(term.bond(site) for term in terms))
        for site, cap in enumerate(selection.shape.bond_dims(), start=1)
    ]
    ranks = [cap + _OVERSAMPLING for cap in selection.caps]
    if not limited:
        ranks = [_FIRST_GUESS] * (sites - 1)
    if selection.rtol is not None and selection.rtol < _MEASURABLE:
        return None
    while any(rank < most for rank, most in zip(ranks, full, strict=True)):
        cores = _project(xp, terms, selection.shape, ranks, rng, like)
        if selection.rtol is None or limited:
            return cores
        squared = _squared_norm(xp, terms)
        missed = max(0.0, squared - float(xp.to_numpy(xp.norm(cores[-1]))) ** 2)
        # A tenth of the squared tolerance here, the rest for rounding afterwards.
        if missed <= 0.1 * selection.rtol**2 * squared:
            return cores
        ranks = [2 * rank for rank in ranks]
    return None


def _project(
    xp: Backend,
    terms: Sequence[_Term],
    shape: MPOShape,
    ranks: Sequence[int],
    rng: np.random.Generator,
    like: Array,
) -> list[Array]:
    """Left-canonical cores of the terms, projected onto ranges found with one random operator."""
    sizes = (1, *shape.bond_dims(ranks), 1)
    sketches: list[list[Array]] = [[xp.eye(1, like=like) for _ in terms]]
    for site in range(shape.sites - 1, 0, -1):
        size = (sizes[site], shape.out_dims[site], shape.in_dims[site], sizes[site + 1])
        probe = xp.normal(size, rng, like=like) * prod(size[1:]) ** -0.5
        sketches.append(
            [term.pull(xp, old, probe, site) for term, old in zip(terms, sketches[-1], strict=True)]
        )
    sketches.reverse()
    cores: list[Array] = []
    carries = [xp.eye(1, like=like) for _ in terms]
    for site in range(shape.sites):
        merged = [term.absorb(xp, c, site) for term, c in zip(terms, carries, strict=True)]
        projected = sum(m @ s for m, s in zip(merged, sketches[site], strict=True))
        if site == shape.sites - 1:
            return [*cores, projected]
        rows = prod(projected.shape[:3])
        isometry = xp.qr(projected.reshape(rows, -1))[0]
        carries = [xp.adjoint(isometry) @ m.reshape(rows, -1) for m in merged]
        cores.append(isometry.reshape(*projected.shape[:3], -1))
    return cores


def _squared_norm(xp: Backend, terms: Sequence[_Term]) -> float:
    """Squared Frobenius norm of a sum of terms, from all inner products between them."""
    total = 0.0
    for i, one in enumerate(terms):
        for j, other in enumerate(terms[: i + 1]):
            product = xp.to_numpy(_overlap(xp, one, other)).real.item()
            total += product if i == j else 2 * product
    return total


def _overlap(xp: Backend, bra: _Term, ket: _Term) -> Array:
    """Inner product of two terms, site by site."""
    environment = xp.eye(1, like=bra.chains[0][0])
    for site in range(len(bra.chains[0])):
        half = ket.absorb(xp, environment, site)
        whole = xp.conj(bra.absorb(xp, xp.eye(bra.bond(site), like=half), site))
        environment = contract(xp, "aoib,aoid->bd", whole, half)
    return environment.reshape(())


def _zip_up(xp: Backend, factors: tuple[Sequence[Array], ...], selection: Limits) -> list[Array]:
    """Left-canonical cores of a product, truncated while it is formed."""
    # With its centre on the left, what is right of a bond is an isometry in each factor.
    term = _Term(tuple(canonicalize(xp, cores, None, 0) for cores in factors))
    sites = selection.shape.sites
    cap = _interim_cap(selection)
    share = (selection.rtol or 0.0) / 10 / max(1, sites - 1) ** 0.5
    cores: list[Array] = []
    carry = xp.eye(1, like=factors[0][0])
    for site in range(sites):
        merged = term.absorb(xp, carry, site)
        if site == sites - 1:
            return [*cores, merged]
        unfolding = merged.reshape(-1, merged.shape[3])
        isometry = truncated_isometry(xp, unfolding, cap, share)
        carry = xp.adjoint(isometry) @ unfolding
        cores.append(isometry.reshape(*merged.shape[:3], -1))
    return cores


def _interim_cap(selection: Limits) -> float:
    """Largest bond while a product is formed: twice what may be kept, if that cuts anything.

    The legs to the right bound a bond of the whole, but none of a part that is not yet multiplied
    with them.
    """
    if selection.caps == selection.shape.bond_dims():
        return inf
    asked = selection.max_bond if selection.bonds is None else selection.bonds
    return 2 * (max(asked) if isinstance(asked, Sequence) else asked or inf)


def _distance(xp: Backend, terms: Sequence[_Term], cores: Sequence[Array]) -> float:
    """Frobenius norm of a sum of terms minus a chain, from the inner products of all."""
    chain = _wide(xp, cores)
    chain[-1] = -1.0 * chain[-1]
    return max(0.0, _squared_norm(xp, [*terms, _Term((chain,))])) ** 0.5


def _successive(mpos: Sequence[MPO], selection: Limits) -> tuple[MPO, TruncationInfo]:
    """Sum with a rounding after every addition, a tolerance shared between the roundings."""
    xp, allowed = get_backend(mpos[0].cores[0]), None
    if len(mpos) == 1:
        return _compressed(mpos[0], selection)
    if selection.rtol is not None:
        chains, exponent = near_one(xp, [_wide(xp, mpo.cores) for mpo in mpos])
        squared = max(0.0, _squared_norm(xp, [_Term((chain,)) for chain in chains]))
        allowed = float(np.ldexp(selection.rtol * squared**0.5 / len(mpos), exponent))
    total, earlier = mpos[0], 0.0
    for position, mpo in enumerate(mpos[1:], start=2):
        total = total + mpo
        last = position == len(mpos)
        norm = float(xp.to_numpy(total.norm()))
        rtol = None if allowed is None or not norm else min(1.0, allowed / norm)
        # An exact list is for the end: on the way a bond may not be that large yet.
        exact = selection.bonds if last else None
        cap = selection.max_bond if selection.bonds is None else selection.caps
        total, info = total.compress(
            max_bond=cap if exact is None else None,
            bonds=exact,
            rtol=rtol,
            max_params=selection.max_params if last else None,
            return_info=True,
        )
        info = replace(info, earlier_error=earlier)
        earlier = info.error_bound
    return total, info


def _compressed(mpo: MPO, selection: Limits) -> tuple[MPO, TruncationInfo]:
    return mpo.compress(
        max_bond=selection.max_bond,
        bonds=selection.bonds,
        rtol=selection.rtol,
        max_params=selection.max_params,
        return_info=True,
    )


def _finish(
    cores: Sequence[Array], exponent: int, selection: Limits, missed: float
) -> tuple[MPO, TruncationInfo]:
    """Round 2ᵉ times projected cores, which missed so much, to what was asked for."""
    rtol = None if selection.rtol is None else 0.9 * selection.rtol
    cores = [*cores[:-1], times_power(cores[-1], exponent)]
    mpo = MPO(cores, selection.shape, selection.shape.sites - 1)
    mpo, info = _compressed(mpo, replace(selection, rtol=rtol))
    return mpo, replace(info, earlier_error=float(np.ldexp(missed, exponent)))


def _as(like: MPO, mpo: MPO) -> MPO:
    xp = get_backend(like.cores[0])
    name = xp.dtype_name(like.cores[0])
    return MPO(narrowed(xp, mpo.cores, name), mpo.shape, mpo.center_site)


def _wide(xp: Backend, cores: Sequence[Array]) -> list[Array]:
    """Cores in double precision, in which an error can be measured as a difference of norms."""
    return [widened(xp, core) for core in cores]
