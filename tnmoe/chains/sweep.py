"""The two-sided sweep: cores split off a tensor from both ends, until the central core is left.

Tensors here are (..., left, middle, right). ``left`` holds the bond to the cores already split off
on the left and the legs of the sites still to come. ``middle`` holds the legs of the centre, and
``right`` is the mirror image of ``left``. Leading axes are a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import WIDE_DTYPE
from tnmoe.chains.precision import as_spectrum
from tnmoe.chains.range_finder import find_range, squared_distance
from tnmoe.chains.unfolding import (
    GramMatrix,
    RangeBasis,
    Reduction,
    TriangularFactor,
    reduce_unfolding,
)
from tnmoe.contraction.build import left_environment, right_environment
from tnmoe.errors import InputError
from tnmoe.truncation.budget import ErrorBudget
from tnmoe.truncation.limits import Limits

# Neighbouring sites share one reduction as long as it has no more rows than this. Up to here
# reading the large tensor once more costs more than the larger reduction does.
_GROUP_ROWS = 512


@dataclass(frozen=True)
class Cut:
    """The truncation of one bond.

    Attributes
    ----------
    discarded : array, shape (batch,)
        2-norm of what was cut of each matrix.
    spectrum : array of shape (..., D), or None
        Schmidt values before the cut, where they are known.
    method : str
        The algorithm.
    """

    discarded: np.ndarray
    spectrum: Array | None
    method: str


@dataclass(frozen=True)
class SweepResult:
    """A decomposed tensor.

    Attributes
    ----------
    cores : tuple of array, shapes (..., D, leg, D')
        One per site. A core without batch axes is the same for all matrices. The cores are
        canonical around ``center_site``.
    cuts : tuple of Cut
        One per bond.
    center_site : int
    """

    cores: tuple[Array, ...]
    cuts: tuple[Cut, ...]
    center_site: int


@dataclass(kw_only=True)
class Sweep:
    """A decomposition under way.

    Parameters
    ----------
    xp : Backend
        Library of the tensor.
    tensor : array, shape (..., left, middle, right)
        What is still to be decomposed; at the end, the central core.
    legs : sequence of int
        Legs of every site, output and input together.
    center_site : int
        Site that the sweep ends at. A bond left of it has no more legs on its left than on its
        right, and a bond right of it the other way round.
    limits : Limits
        Bond dimensions and errors to keep to.
    method : str
        How to find singular vectors; see :func:`tnmoe.decompose`.
    rng : numpy Generator
        For the randomized method.
    with_spectra : bool
        Whether to find the Schmidt values also of bonds at which nothing is cut.
    """

    xp: Backend
    tensor: Array
    legs: Sequence[int]
    center_site: int
    limits: Limits
    method: str
    rng: np.random.Generator
    with_spectra: bool
    _cores: dict[int, Array] = field(default_factory=dict, init=False)
    _cuts: dict[int, Cut] = field(default_factory=dict, init=False)
    # Reductions of whole sides of the tensor as it stands, which the budget needed.
    _side_reductions: dict[tuple[int, ...], GramMatrix | TriangularFactor] = field(
        default_factory=dict, init=False
    )

    def run(self) -> SweepResult:
        """Split off all cores but the central one, which is what remains of the tensor."""
        budget = self._budget()
        # The smaller side first: its cuts make the larger side cheaper.
        for sites in sorted(
            self._sides(), key=lambda sites: prod(self.legs[site] for site in sites)
        ):
            remaining, bond_dim = list(sites), 1
            while remaining:
                size = self._group_size(remaining, bond_dim)
                group, remaining = remaining[:size], remaining[size:]
                bond_dim = self._split_off(group, bond_dim, budget)
        self._cores[self.center_site] = self.tensor
        return SweepResult(
            cores=tuple(self._cores[site] for site in range(len(self.legs))),
            cuts=tuple(self._cuts[bond] for bond in range(len(self.legs) - 1)),
            center_site=self.center_site,
        )

    def _budget(self) -> ErrorBudget:
        limits = self.limits
        if not limits.needs_spectra:
            return limits.budget()
        if self.method != "randomized":
            return limits.budget(self._all_spectra())
        if limits.max_params is not None:
            raise InputError(
                "max_params weighs all Schmidt values, which method='randomized' does not find"
            )
        bonds = len(self.legs) - 1
        share = (limits.rtol * self._norms()) ** 2 / max(1, bonds)
        return ErrorBudget(limits.caps, [share] * bonds)

    def _all_spectra(self) -> list[np.ndarray]:
        """Find the Schmidt values (batch, D) of every bond of the tensor as it stands."""
        spectra: dict[int, np.ndarray] = {}
        for sites in self._sides():
            if not sites:
                continue
            reduction, rows = self._reduce(sites, 1), 1
            self._side_reductions[tuple(sites)] = reduction
            values = np.empty(0)
            for site in sites:
                if rows == 1 or self.legs[site] > 1:
                    rows *= self.legs[site]
                    values = self._as_batch(reduction.schmidt_values(rows))
                spectra[self._bond(site)] = values  # a leg of 1 leaves them as they were
        return [spectra[bond] for bond in sorted(spectra)]

    def _sides(self) -> list[Sequence[int]]:
        """List the sites left and right of the centre, each side from its outermost site."""
        return [range(self.center_site), range(len(self.legs) - 1, self.center_site, -1)]

    def _bond(self, site: int) -> int:
        """Return the bond between a site and its neighbour towards the centre."""
        return site if site < self.center_site else site - 1

    def _group_size(self, sites: Sequence[int], bond_dim: int) -> int:
        """Count the next sites that share one reduction: at least one."""
        rows, size = bond_dim * self.legs[sites[0]], 1
        if self.method == "randomized":
            return size
        while size < len(sites) and rows * self.legs[sites[size]] <= _GROUP_ROWS:
            rows *= self.legs[sites[size]]
            size += 1
        return size

    def _split_off(self, sites: Sequence[int], bond_dim: int, budget: ErrorBudget) -> int:
        """Split off the cores of neighbouring sites, outermost first; return the next bond."""
        first_bond, reduction = bond_dim, None
        columns = prod(self.tensor.shape[-3:]) // bond_dim
        for site in sites:
            bond, rows = self._bond(site), bond_dim * self.legs[site]
            columns //= self.legs[site]
            keeps_all = self._keeps_all(budget, bond, rows)
            found: Reduction | None = None
            if self.method == "randomized" and not keeps_all:
                found = self._find_range(site, first_bond, budget)
            elif reduction is None and (self.with_spectra or not keeps_all):
                # Nothing has been cut in this group yet: the tensor is still what it was.
                reduction = self._reduce(sites, first_bond)
            if keeps_all:
                values = reduction.schmidt_values(rows) if reduction else None
                self._cuts[bond] = Cut(np.zeros(self._batch_size), values, "qr")
                isometry = self.xp.eye(rows, like=self.tensor)
            else:
                found = found or reduction or self._reduce(sites, first_bond)
                isometry = self._cut(bond, found, budget, rows, columns)
                reduction = reduction and reduction.project(isometry)
            self._store(site, bond_dim, isometry)
            bond_dim = isometry.shape[-1]
        if any(self._cuts[self._bond(site)].method != "qr" for site in sites):
            self._project(sites)
        return bond_dim

    def _cut(
        self, bond: int, reduction: Reduction, budget: ErrorBudget, rows: int, columns: int
    ) -> Array:
        """Return the isometry (..., rows, rank) of the Schmidt vectors within the budget."""
        vectors, values = reduction.singular_vectors(rows)
        spectra = as_spectrum(self.xp, values).reshape(-1, values.shape[-1])
        if isinstance(reduction, RangeBasis):
            # The norm of the part outside its span stands for the values that are missing.
            spectra = np.concatenate([spectra, reduction.missed[:, None]], axis=-1)
        limit = min(rows, columns, vectors.shape[-1])
        rank, discarded = budget.choose(bond, spectra, limit)
        self._cuts[bond] = Cut(discarded, values, reduction.method)
        return vectors[..., :rank]

    def _keeps_all(self, budget: ErrorBudget, bond: int, rows: int) -> bool:
        """Check whether a bond keeps all rows, so that the identity can serve as its isometry."""
        is_full = budget.ranks[bond] >= rows and (
            self.method != "randomized" or not budget.adaptive
        )
        if self.method == "qr" and not is_full:
            raise InputError(
                "method='qr' finds no Schmidt values and so cannot truncate: "
                f"bond {bond} has dimension {rows} and would have to shrink"
            )
        return is_full and self.method in ("auto", "qr", "randomized")

    def _reduce(self, sites: Sequence[int], bond_dim: int) -> GramMatrix | TriangularFactor:
        """Reduce the unfolding whose rows are the bond and the legs of outermost sites."""
        if tuple(sites) in self._side_reductions:
            return self._side_reductions.pop(tuple(sites))
        rows = bond_dim * prod(self.legs[site] for site in sites)
        from_left = sites[0] < self.center_site
        method = self.method if self.method in ("svd", "eigh") else None
        return reduce_unfolding(self.xp, self._unfolding(rows, from_left), method, not from_left)

    def _find_range(self, site: int, bond_dim: int, budget: ErrorBudget) -> RangeBasis | None:
        """Find the range of one site's unfolding by projection; None where that would not pay."""
        unfolding = self._unfolding(bond_dim * self.legs[site], site < self.center_site)
        bond = self._bond(site)
        allowed = budget.allowed_error(bond)
        return find_range(self.xp, unfolding, budget.ranks[bond], allowed, self.rng)

    def _unfolding(self, rows: int, from_left: bool) -> Array:
        """Reshape the tensor to (..., rows, columns), the rows being outermost legs of a side."""
        *batch, left, middle, right = self.tensor.shape
        columns = left * middle * right // rows
        if from_left:
            return self.tensor.reshape(*batch, rows, columns)
        return self.xp.transpose(self.tensor.reshape(*batch, columns, rows))

    def _store(self, site: int, bond_dim: int, isometry: Array) -> None:
        """Keep an isometry as a core; its rows are (bond, leg), or (leg, bond) on the right."""
        *batch, _, rank = isometry.shape
        leg = self.legs[site]
        if site < self.center_site:
            self._cores[site] = isometry.reshape(*batch, bond_dim, leg, rank)
        else:
            # A = (Aᵀ)ᵀ: the transpose splits into U (Uᴴ Aᵀ), so A = (A Ū) Uᵀ: no conjugate here.
            self._cores[site] = self.xp.transpose(isometry).reshape(*batch, rank, leg, bond_dim)

    def _project(self, sites: Sequence[int]) -> None:
        """Project the tensor onto the isometries of neighbouring sites, outermost first."""
        self._side_reductions.clear()
        xp = self.xp
        *batch, left, middle, right = self.tensor.shape
        # Environments take cores with two legs: the input leg is 1.
        cores = [self._cores[site][..., None, :] for site in sites]
        environment: Array
        if sites[0] < self.center_site:
            environment = left_environment(xp, cores)[0]
            rows, rank = environment.shape[-2:]
            unfolding = self.tensor.reshape(*batch, rows, -1)
            projected = xp.adjoint(environment) @ unfolding
            self._measure_discarded(sites, unfolding, environment, projected)
            self.tensor = projected.reshape(*batch, rank * (left // rows), middle, right)
        else:
            environment = right_environment(xp, cores[::-1])[0]
            rank, rows = environment.shape[-2:]
            unfolding = self.tensor.reshape(*batch, -1, rows)
            projected = unfolding @ xp.adjoint(environment)
            matrices = map(xp.transpose, (unfolding, environment, projected))
            self._measure_discarded(sites, *matrices)
            self.tensor = projected.reshape(*batch, left, middle, (right // rows) * rank)

    def _measure_discarded(
        self, sites: Sequence[int], unfolding: Array, environment: Array, projected: Array
    ) -> None:
        """Scale the norms that were cut at neighbouring sites to the error that was made.

        Squares in double precision show no error below 1e-8 of the norm. Measuring it takes one
        more product, which pays only if the caller asks what was cut.
        """
        bonds = [self._bond(site) for site in sites]
        cuts = [self._cuts[bond] for bond in bonds]
        in_double = self.xp.dtype_name(unfolding) not in WIDE_DTYPE
        has_squares = in_double and any(cut.method == GramMatrix.method for cut in cuts)
        if not (self.with_spectra and has_squares and self.xp.has_numbers(unfolding)):
            return
        estimated = np.sqrt(sum(cut.discarded**2 for cut in cuts))
        measured = np.sqrt(squared_distance(self.xp, unfolding, environment, projected))
        shares = np.minimum(1, measured / np.where(estimated > 0, estimated, 1))
        for bond, cut in zip(bonds, cuts, strict=True):
            self._cuts[bond] = replace(cut, discarded=cut.discarded * shares)

    @property
    def _batch_size(self) -> int:
        return prod(self.tensor.shape[:-3])

    def _as_batch(self, values: Array) -> np.ndarray:
        """Return values (..., D) as a NumPy array (batch, D)."""
        return self.xp.to_numpy(values).reshape(-1, values.shape[-1])

    def _norms(self) -> np.ndarray:
        tensors = self.tensor.reshape(self._batch_size, *self.tensor.shape[-3:])
        return np.array([float(self.xp.to_numpy(self.xp.norm(tensor))) for tensor in tensors])
