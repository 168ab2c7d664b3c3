"""Randomized rounding: a sum of products projected onto ranges that random operators find."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.chains.range_finder import FIRST_RANK, OVERSAMPLING
from tnmoe.chains.terms import Term, squared_norm
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape
from tnmoe.truncation.limits import Limits

# Below this relative error ‖W‖² − ‖result‖² is rounding, and cannot be measured.
_MEASURABLE = 1e-6
# Part of the squared tolerance for the projection. The rest is for the rounding afterwards.
_PROJECTION_PART = 0.1


def project_terms(
    xp: Backend, terms: Sequence[Term], limits: Limits, rng: np.random.Generator
) -> list[Array] | None:
    """Project a sum of terms onto random ranges a little larger than the limits.

    Parameters
    ----------
    xp : Backend
        Library of the terms.
    terms : sequence of Term
        In double precision.
    limits : Limits
        For the whole; with ``rtol`` alone the ranges grow until the error is small enough.
    rng : numpy Generator
        Source of the random operators.

    Returns
    -------
    list of array or None
        Left-canonical cores; None where forming the sum is as cheap.

    Raises
    ------
    InputError
        If there are neither bonds nor a tolerance.

    Notes
    -----
    Al Daas et al., SIAM J. Sci. Comput. 45, A74 (2023), algorithm 3.2.
    """
    has_bonds = limits.bonds is not None or limits.max_bond is not None
    if not has_bonds and limits.rtol is None:
        raise InputError("method='randomized' needs max_bond, bonds or rtol")
    full = [
        min(cap, sum(term.bond(site) for term in terms))
        for site, cap in enumerate(limits.shape.bond_dims(), start=1)
    ]
    ranks = [cap + OVERSAMPLING for cap in limits.caps]
    if not has_bonds:
        ranks = [FIRST_RANK] * len(full)
    if limits.rtol is not None and limits.rtol < _MEASURABLE:
        return None
    while any(rank < largest for rank, largest in zip(ranks, full, strict=True)):
        cores = _project(xp, terms, limits.shape, ranks, rng)
        if limits.rtol is None or has_bonds:
            return cores
        squared = squared_norm(xp, terms)
        missed = max(0.0, squared - float(xp.to_numpy(xp.norm(cores[-1]))) ** 2)
        if missed <= _PROJECTION_PART * limits.rtol**2 * squared:
            return cores
        ranks = [2 * rank for rank in ranks]
    return None


def _project(
    xp: Backend,
    terms: Sequence[Term],
    shape: MPOShape,
    ranks: Sequence[int],
    rng: np.random.Generator,
) -> list[Array]:
    """Return left-canonical cores of the terms, projected with one random operator."""
    like = terms[0].chains[0][0]
    sketches = _sketches(xp, terms, shape, ranks, rng)
    cores: list[Array] = []
    carries = [xp.eye(1, like=like) for _ in terms]
    for site in range(shape.sites):
        merged = [term.absorb(xp, carry, site) for term, carry in zip(terms, carries, strict=True)]
        projected = sum(core @ sketch for core, sketch in zip(merged, sketches[site], strict=True))
        if site == shape.sites - 1:
            return [*cores, projected]
        rows = prod(projected.shape[:3])
        isometry = xp.qr(projected.reshape(rows, -1))[0]
        carries = [xp.adjoint(isometry) @ core.reshape(rows, -1) for core in merged]
        cores.append(isometry.reshape(*projected.shape[:3], -1))
    return cores


def _sketches(
    xp: Backend,
    terms: Sequence[Term],
    shape: MPOShape,
    ranks: Sequence[int],
    rng: np.random.Generator,
) -> list[list[Array]]:
    """Contract the part of every term right of each site with that of one random operator."""
    like = terms[0].chains[0][0]
    probes = shape.core_shapes(ranks)
    sketches: list[list[Array]] = [[xp.eye(1, like=like) for _ in terms]]
    for site in range(shape.sites - 1, 0, -1):
        probe = xp.normal(probes[site], rng, like=like) * prod(probes[site][1:]) ** -0.5
        sketches.append(
            [
                term.pull(xp, sketch, probe, site)
                for term, sketch in zip(terms, sketches[-1], strict=True)
            ]
        )
    return sketches[::-1]
