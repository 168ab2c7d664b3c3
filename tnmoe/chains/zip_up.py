"""Zip-up: a product of two chains, truncated site by site while it is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from tnmoe.backends import Array, Backend
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.rounding import truncated_isometry
from tnmoe.chains.terms import Term
from tnmoe.truncation.limits import Limits

# The truncations on the way may use the tolerance divided by this, all together.
_TOLERANCE_DIVISOR = 10
# The largest bond on the way, as a multiple of the largest one allowed in the end.
_INTERIM_FACTOR = 2


def zip_up(xp: Backend, term: Term, limits: Limits) -> list[Array]:
    """Return left-canonical cores of a product, with bonds a little larger than the limits.

    Stoudenmire, White, New J. Phys. 12, 055026 (2010), section 2.3.

    Parameters
    ----------
    xp : Backend
        Library of the factors.
    term : Term
        The product of two chains.
    limits : Limits
        For the rounding afterwards.
    """
    # With the centres on the left, the part right of a bond is an isometry in each factor.
    term = replace(term, chains=tuple(canonicalize(xp, chain, None, 0) for chain in term.chains))
    sites = limits.shape.sites
    cap = _interim_cap(limits)
    share = (limits.rtol or 0.0) / _TOLERANCE_DIVISOR / max(1, sites - 1) ** 0.5
    cores: list[Array] = []
    carry = xp.eye(1, like=term.chains[0][0])
    for site in range(sites):
        merged = term.absorb(xp, carry, site)
        if site == sites - 1:
            return [*cores, merged]
        unfolding = merged.reshape(-1, merged.shape[3])
        isometry = truncated_isometry(xp, unfolding, cap, share)
        carry = xp.adjoint(isometry) @ unfolding
        cores.append(isometry.reshape(*merged.shape[:3], -1))
    return cores


def _interim_cap(limits: Limits) -> float:
    """Return the largest bond on the way: twice the limit, if that cuts anything.

    The legs to the right bound a bond of the whole, but not of a part that still lacks them.
    """
    if limits.caps == limits.shape.bond_dims():
        return inf
    largest = limits.max_bond if limits.bonds is None else limits.bonds
    return _INTERIM_FACTOR * (max(largest) if isinstance(largest, Sequence) else largest or inf)
