"""The two-sided sweep: cores split off a tensor from both ends, until the central core is left.

Tensors here are (..., left, middle, right): ``left`` holds the bond to the cores already split off
on the left and the legs of the sites still to come, ``middle`` the legs of the centre, ``right``
the mirror image of ``left``. Leading axes are a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import WIDE_DTYPE
from tnmoe.chains.randomized import RangeBasis, find_missed, find_range
from tnmoe.chains.unfolding import GramMatrix, TriangularFactor
from tnmoe.errors import InputError
from tnmoe.truncation.limits import ErrorBudget, Limits

# Neighbouring sites share one matrix of weights as long as it has no more rows than this: up to
# here reading the big tensor once more costs more than the larger matrix does.
_GROUP_ROWS = 512


Reduction = GramMatrix | TriangularFactor | RangeBasis


@dataclass
class Cut:
    """What happened at one bond: 2-norm cut (batch,), Schmidt values (..., D) if known, how."""

    discarded: np.ndarray
    spectrum: Array | None
    method: str


@dataclass
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
        Site that the sweep ends at: a bond left of it has no more legs on its left than on its
        right, and a bond right of it the other way round.
    selection : Limits
        Bond dimensions asked for.
    method : str
        How to find singular vectors; see :func:`tnmoe.decompose`.
    rng : numpy Generator
        For the randomized method.
    want_spectra : bool
        Find the Schmidt values of bonds at which nothing is cut, too.
    """

    xp: Backend
    tensor: Array
    legs: Sequence[int]
    center_site: int
    selection: Limits
    method: str
    rng: np.random.Generator
    want_spectra: bool
    cores: dict[int, Array] = field(default_factory=dict)
    cuts: dict[int, Cut] = field(default_factory=dict)
    # Weights of whole sides of the tensor as it stands, from planning.
    _kept: dict[tuple[int, ...], GramMatrix | TriangularFactor] = field(default_factory=dict)

    def run(self) -> None:
        """Split off all cores but the central one: (..., D, leg, D') each."""
        plan = self._plan()
        # The smaller side first: what it cuts makes the larger one cheaper.
        for sites in sorted(
            self._sides(), key=lambda sites: prod(self.legs[site] for site in sites)
        ):
            remaining, bond_dim = list(sites), 1
            while remaining:
                size = self._group_size(remaining, bond_dim)
                group, remaining = remaining[:size], remaining[size:]
                bond_dim = self._split_off(group, bond_dim, plan)

    def _plan(self) -> ErrorBudget:
        selection = self.selection
        if not selection.needs_spectra:
            return selection.plan()
        if self.method != "randomized":
            return selection.plan(self._all_spectra())
        if selection.max_params is not None:
            raise InputError(
                "max_params weighs all Schmidt values, which method='randomized' does not find"
            )
        bonds = len(self.legs) - 1
        share = (selection.rtol * self._norms()) ** 2 / max(1, bonds)
        return ErrorBudget(selection.caps, [share] * bonds)

    def _all_spectra(self) -> list[np.ndarray]:
        """Schmidt values (batch, D) of every bond of the tensor as it stands."""
        spectra: dict[int, np.ndarray] = {}
        for sites in self._sides():
            if not sites:
                continue
            weights, rows = self._weights(sites, 1), 1
            self._kept[tuple(sites)] = weights
            values = np.empty(0)
            for site in sites:
                if rows == 1 or self.legs[site] > 1:
                    rows *= self.legs[site]
                    values = self._numbers(weights.values(rows))
                spectra[self._bond(site)] = values  # a leg of 1 leaves them as they were
        return [spectra[bond] for bond in sorted(spectra)]

    def _sides(self) -> list[Sequence[int]]:
        """Sites left and right of the centre, each from the outermost one inwards."""
        return [range(self.center_site), range(len(self.legs) - 1, self.center_site, -1)]

    def _bond(self, site: int) -> int:
        """The bond between a site and its neighbour on the centre's side."""
        return site if site < self.center_site else site - 1

    def _group_size(self, sites: Sequence[int], bond_dim: int) -> int:
        """How many of the next sites share one matrix of weights; at least one."""
        rows, size = bond_dim * self.legs[sites[0]], 1
        if self.method == "randomized":
            return size
        while size < len(sites) and rows * self.legs[sites[size]] <= _GROUP_ROWS:
            rows *= self.legs[sites[size]]
            size += 1
        return size

    def _split_off(self, sites: Sequence[int], bond_dim: int, plan: ErrorBudget) -> int:
        """Split off the cores of neighbouring sites, outermost first; the bond that remains."""
        start, weights = bond_dim, None
        columns = prod(self.tensor.shape[-3:]) // bond_dim
        for site in sites:
            bond, rows = self._bond(site), bond_dim * self.legs[site]
            columns //= self.legs[site]
            keeps_all = self._keeps_all(plan, bond, rows)
            found: Reduction | None = None
            if self.method == "randomized" and not keeps_all:
                found = self._range(site, start, plan)
            elif weights is None and (self.want_spectra or not keeps_all):
                # Nothing has been cut in this group yet: the tensor is still what it was.
                weights = self._weights(sites, start)
            if keeps_all:
                values = weights.values(rows) if weights else None
                self.cuts[bond] = Cut(np.zeros(self._batch_size), values, "qr")
                isometry = self.xp.eye(rows, like=self.tensor)
            else:
                found = found or weights or self._weights(sites, start)
                isometry = self._cut(bond, found, plan, rows, columns)
                weights = weights and weights.project(isometry)
            self._store(site, bond_dim, isometry)
            bond_dim = isometry.shape[-1]
        if any(self.cuts[self._bond(site)].method != "qr" for site in sites):
            self._project(sites)
        return bond_dim

    def _cut(
        self, bond: int, weights: Reduction, plan: ErrorBudget, rows: int, columns: int
    ) -> Array:
        """Isometry (..., rows, rank) of the Schmidt vectors that the plan keeps."""
        vectors, values = weights.split(rows)
        seen = self._numbers(values)
        if isinstance(weights, RangeBasis):
            # The norm of what was not seen stands for the values that are missing.
            seen = np.concatenate([seen, weights.missed[:, None]], axis=-1)
        limit = min(rows, columns, vectors.shape[-1])
        rank, discarded = plan.choose(bond, seen, limit)
        self.cuts[bond] = Cut(discarded, values, weights.name)
        return vectors[..., :rank]

    def _keeps_all(self, plan: ErrorBudget, bond: int, rows: int) -> bool:
        """Whether any isometry will do, and so the identity, because nothing is to be cut."""
        full = plan.ranks[bond] >= rows and (self.method != "randomized" or not plan.adaptive)
        if self.method == "qr" and not full:
            raise InputError(
                f"method='qr' finds no Schmidt values and so cannot truncate: bond {bond} "
                f"has dimension {rows}, and less was asked for"
            )
        return full and self.method in ("auto", "qr", "randomized")

    def _weights(self, sites: Sequence[int], bond_dim: int) -> GramMatrix | TriangularFactor:
        """Weights of the outermost legs of one side: of the given sites and the bond to them."""
        if tuple(sites) in self._kept:
            return self._kept.pop(tuple(sites))
        method = self.method
        if method not in ("svd", "eigh"):
            method = "eigh" if self.xp.dtype_name(self.tensor) in WIDE_DTYPE else "svd"
        kind = GramMatrix if method == "eigh" else TriangularFactor
        rows = bond_dim * prod(self.legs[site] for site in sites)
        from_left = sites[0] < self.center_site
        return kind.of(self.xp, self._unfolding(rows, from_left), last=not from_left)

    def _range(self, site: int, bond_dim: int, plan: ErrorBudget) -> RangeBasis | None:
        """What the randomized method finds at one site; None where it would not pay."""
        unfolding = self._unfolding(bond_dim * self.legs[site], site < self.center_site)
        bond = self._bond(site)
        return find_range(self.xp, unfolding, plan.ranks[bond], plan.budget(bond), self.rng)

    def _unfolding(self, rows: int, from_left: bool) -> Array:
        """The tensor as (..., rows, columns), rows being the outermost legs of one side."""
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
            self.cores[site] = isometry.reshape(*batch, bond_dim, leg, rank)
        else:
            # A = (Aᵀ)ᵀ: the transpose splits into U (Uᴴ Aᵀ), so A = (A Ū) Uᵀ: no conjugate here.
            self.cores[site] = self.xp.transpose(isometry).reshape(*batch, rank, leg, bond_dim)

    def _project(self, sites: Sequence[int]) -> None:
        """Project the tensor onto the isometries of neighbouring sites, outermost first."""
        self._kept.clear()
        xp = self.xp
        *batch, left, middle, right = self.tensor.shape
        environment = _environment(
            [self.cores[site] for site in sites], sites[0] < self.center_site
        )
        rows, rank = environment.shape[-2:]
        if sites[0] < self.center_site:
            unfolding = self.tensor.reshape(*batch, rows, -1)
            projected = xp.adjoint(environment) @ unfolding
            self._measure(sites, unfolding, environment, projected)
            self.tensor = projected.reshape(*batch, rank * (left // rows), middle, right)
        else:
            rank, rows = rows, rank
            unfolding = self.tensor.reshape(*batch, -1, rows)
            projected = unfolding @ xp.adjoint(environment)
            self._measure(sites, *map(xp.transpose, (unfolding, environment, projected)))
            self.tensor = projected.reshape(*batch, left, middle, (right // rows) * rank)

    def _measure(
        self, sites: Sequence[int], unfolding: Array, environment: Array, projected: Array
    ) -> None:
        """Put what was cut at neighbouring sites in the place of what rounding let it seem to be.

        Squares in double precision tell no error below 1e-8 of the norm: its true size takes one
        more product, for those who want to know.
        """
        cuts = [self.cuts[self._bond(site)] for site in sites]
        in_double = self.xp.dtype_name(unfolding) not in WIDE_DTYPE
        if not (self.want_spectra and in_double and any(cut.method == "eigh" for cut in cuts)):
            return
        seemed = np.sqrt(sum(cut.discarded**2 for cut in cuts))
        measured = np.sqrt(find_missed(self.xp, unfolding, environment, projected))
        for cut in cuts:
            cut.discarded = cut.discarded * np.minimum(
                1, measured / np.where(seemed > 0, seemed, 1)
            )

    @property
    def _batch_size(self) -> int:
        return prod(self.tensor.shape[:-3])

    def _numbers(self, values: Array) -> np.ndarray:
        return self.xp.to_numpy(values).reshape(-1, values.shape[-1])

    def _norms(self) -> np.ndarray:
        tensors = self.tensor.reshape(self._batch_size, *self.tensor.shape[-3:])
        return np.array([float(self.xp.to_numpy(self.xp.norm(tensor))) for tensor in tensors])


def _environment(cores: Sequence[Array], from_left: bool) -> Array:
    """Product of cores, outermost first: (..., rows, D) from the left, (..., D, rows) otherwise."""
    if from_left:
        *batch, left, leg, right = cores[0].shape
        product = cores[0].reshape(*batch, left * leg, right)
        for core in cores[1:]:
            *batch, left, leg, right = core.shape
            product = product @ core.reshape(*batch, left, leg * right)
            product = product.reshape(*product.shape[:-2], -1, right)
        return product
    *batch, left, leg, right = cores[0].shape
    product = cores[0].reshape(*batch, left, leg * right)
    for core in cores[1:]:
        *batch, left, leg, right = core.shape
        product = core.reshape(*batch, left * leg, right) @ product
        product = product.reshape(*product.shape[:-2], left, -1)
    return product
