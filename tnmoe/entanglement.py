"""Entanglement of an operator, read as a state: Schmidt decompositions and mutual information."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.canonical import canonicalize, schmidt_split
from tnmoe.chains.precision import computable, narrowed, widened
from tnmoe.chains.scaling import normalized_chains
from tnmoe.contraction.einsum import contract
from tnmoe.errors import InputError, check_index, check_positive_int
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape, resolve_sites
from tnmoe.system.memory import explain_memory_error, in_gigabytes
from tnmoe.truncation.spectra import entanglement_entropy


@dataclass(frozen=True)
class SchmidtDecomposition:
    """An operator as a sum Σ σₖ Lₖ ⊗ Rₖ of products of operators left and right of a bond.

    Attributes
    ----------
    values : array, shape (count,)
        The Schmidt values σₖ, descending.
    left, right : tuple of MPO
        The operators Lₖ on the sites left of the bond and Rₖ on those right of it. Each family is
        orthonormal in the Frobenius inner product. The operators of a family have all cores but
        one in common.
    discarded : float
        2-norm of the Schmidt values that were left out. It is the Frobenius error of the sum.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> one = MPO.identity(MPOShape((2, 3), (2, 3)))
    >>> operator_schmidt(one, bond=0)
    SchmidtDecomposition(count=1, discarded=0.0)
    """

    values: Array
    left: tuple[MPO, ...] = field(repr=False)
    right: tuple[MPO, ...] = field(repr=False)
    discarded: float

    def __repr__(self) -> str:
        return f"SchmidtDecomposition(count={len(self.left)}, discarded={self.discarded})"


def operator_schmidt(mpo: MPO, bond: int, count: int | None = None) -> SchmidtDecomposition:
    """Decompose an operator across a bond into products of orthonormal operators.

    The sites left of the bond stand against those right of it. Other divisions of the sites, such
    as odd against even ones, are not available: they have no bond. :meth:`MPO.schmidt_values`
    returns the values alone, and :meth:`MPO.entropy` their entropy.

    Parameters
    ----------
    mpo : MPO
        Any shape. Of a padded one, the whole chain is decomposed.
    bond : int
        From 0 to sites − 2, left to right.
    count : int, optional
        Largest number of terms, those with the largest Schmidt values. By default all of them.
        Schmidt values that are rounding noise are always left out.

    Returns
    -------
    SchmidtDecomposition
        At least one term, even of the zero operator.

    Raises
    ------
    InputError
        If there is no such bond, or ``count`` is not a positive integer.

    Examples
    --------
    >>> from tnmoe import MPOShape, kron
    >>> mpo = MPO.random(MPOShape((2, 3, 2), (2, 3, 2)), max_bond=3, rng=0)
    >>> parts = operator_schmidt(mpo, bond=1)
    >>> total = sum(
    ...     float(value) * kron(left, right)
    ...     for value, left, right in zip(parts.values, parts.left, parts.right)
    ... )
    >>> bool(np.allclose(total.to_matrix(), mpo.to_matrix()))
    True
    """
    if mpo.shape.sites == 1:
        raise InputError(f"bond must lie between two sites, and there is one: got {bond!r}")
    bond = check_index("bond", bond, mpo.shape.sites - 1)
    if count is not None:
        count = check_positive_int("count", count)
    xp, dtype = get_backend(mpo.cores[0]), get_backend(mpo.cores[0]).dtype_name(mpo.cores[0])
    # The exact rank, so that no term is noise.
    exact = mpo.compress(center_site=bond)
    with xp.full_precision(mpo.cores[0]):
        cores = [computable(xp, core) for core in exact.cores]
        left, values, right = schmidt_split(xp, cores, bond)
        lefts = narrowed(xp, [*cores[:bond], left], dtype)
        rights = narrowed(xp, [right, *cores[bond + 2 :]], dtype)
    kept = range(min(count or values.shape[0], values.shape[0]))
    return SchmidtDecomposition(
        values=values[: len(kept)],
        left=tuple(MPO([*lefts[:-1], lefts[-1][..., k : k + 1]], center_site=bond) for k in kept),
        right=tuple(MPO([rights[0][k : k + 1], *rights[1:]], center_site=0) for k in kept),
        discarded=float(np.linalg.norm(xp.to_numpy(values)[len(kept) :].astype(np.float64))),
    )


def mutual_information(mpo: MPO, first: int | Iterable[int], second: int | Iterable[int]) -> float:
    """Compute the mutual information between two groups of sites, in nats.

    The operator counts as a pure state, divided by its norm, with one subsystem per site: its
    output and its input leg together. I(A:B) = S(A) + S(B) − S(AB), where S is the von Neumann
    entropy of the reduced density matrix of a group. It is 0 if the groups are independent, and at
    most twice the entropy of one group.

    Parameters
    ----------
    mpo : MPO
        Any shape. Of a padded one, the whole chain is the state.
    first, second : int or iterable of int
        Sites of the two groups A and B, which need not be neighbours. No site is in both.

    Returns
    -------
    float
        At least 0. The zero operator has none.

    Raises
    ------
    InputError
        If a group is empty, a site does not exist, or a site is named twice.

    Notes
    -----
    A group's density matrix comes from a contraction of the sites from its first to its last, in
    double precision. For a group with legs of product d it takes memory for d² D² numbers. If the
    rest of the sites has fewer legs, their density matrix takes its place: it has the same entropy.

    Examples
    --------
    Two sites that are always in the same state, and a third one for itself:

    >>> pair = MPO([np.eye(2).reshape(1, 2, 1, 2), np.eye(2).reshape(2, 2, 1, 1)])
    >>> from tnmoe import kron
    >>> mpo = kron(pair, MPO([np.ones((1, 2, 2, 1))]))
    >>> round(mutual_information(mpo, 0, 1), 4), round(mutual_information(mpo, 0, 2), 4)
    (1.3863, 0.0)
    """
    a = resolve_sites(mpo.shape, first, "first")
    b = resolve_sites(mpo.shape, second, "second")
    if both := set(a) & set(b):
        raise InputError(f"first and second must have no site in common, got {sorted(both)}")
    xp = get_backend(mpo.cores[0])
    with xp.full_precision(mpo.cores[0]):
        (cores,), _ = normalized_chains(xp, [[widened(xp, core) for core in mpo.cores]])
        entropies = [_entropy_of(xp, mpo.shape, cores, group) for group in (a, b, (*a, *b))]
    return max(0.0, entropies[0] + entropies[1] - entropies[2])


def _entropy_of(
    xp: Backend, shape: MPOShape, cores: Sequence[Array], group: Iterable[int]
) -> float:
    """Return the entropy of a group of sites: that of the smaller side, itself or the rest."""
    sides = [sorted(group), sorted(set(range(shape.sites)) - set(group))]
    smaller = min(sides, key=lambda side: prod(shape.legs[site] for site in side))
    if not smaller:
        return 0.0
    size = prod(shape.legs[site] for site in smaller)
    with explain_memory_error(
        f"the density matrix of the sites {smaller} takes {in_gigabytes(16 * size**2)} at least"
    ):
        eigenvalues = xp.to_numpy(xp.eigvalsh(_density_matrix(xp, cores, smaller)))
    return entanglement_entropy(np.sqrt(eigenvalues.clip(0.0)))


def _density_matrix(xp: Backend, cores: Sequence[Array], sites: Sequence[int]) -> Array:
    """Return the reduced density matrix of some sites in ascending order, up to its trace."""
    first, last = sites[0], sites[-1]
    # In this gauge, the sites left of the first and right of the last contract to the identity.
    cores = canonicalize(xp, cores, None, first)
    bond = cores[first].shape[0]
    # The environment has axes (kept legs, kept legs of the conjugate, bond, bond of the conjugate).
    environment = xp.eye(bond, like=cores[first]).reshape(1, 1, bond, bond)
    for site in range(first, last + 1):
        core = cores[site].reshape(cores[site].shape[0], -1, cores[site].shape[3])
        pair = core, xp.conj(core)
        if site not in sites:
            environment = contract(xp, "xyab,alc,bld->xycd", environment, *pair)
        elif site < last:
            environment = contract(xp, "xyab,alc,bmd->xlymcd", environment, *pair)
            size = environment.shape[0] * environment.shape[1]
            environment = environment.reshape(size, size, *environment.shape[4:])
        else:
            environment = contract(xp, "xyab,alc,bmc->xlym", environment, *pair)
    size = environment.shape[0] * environment.shape[1]
    return environment.reshape(size, size)
