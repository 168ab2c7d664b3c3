"""The search for chains of experts that share some cores, at given limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.chains.canonical_fit import fit_canonical
from tnmoe.chains.interleave import interleave
from tnmoe.chains.moments import Moments
from tnmoe.chains.shared_fit import SharedFit, fit_shared
from tnmoe.chains.whitening import Whitening
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.decompose import decompose_batch
from tnmoe.joint.starts import joint_sweep, starts, with_best_owned
from tnmoe.options import ChainForm, Method
from tnmoe.shapes import MPOShape

# Sweeps after which the best start is chosen.
_FIRST_SWEEPS = 3

# From targets and cores to better cores, in a number of sweeps and until a tolerance.
Fit = Callable[[Array, list[Array], int, float], SharedFit]


@dataclass(frozen=True)
class Chains:
    """The chains of experts, and how they were found.

    Attributes
    ----------
    cores : list of array, shapes (E, D, out, in, D') or (1, D, out, in, D')
    history : tuple of float
        Relative error of all experts together, at the start and after every sweep of least squares.
    converged : bool
    start : str
        What the first sweep started from.
    factors : array of float, shape (E,), or None
        The chain of an expert is this number times the product of its cores; by default 1.
    """

    cores: list[Array]
    history: tuple[float, ...]
    converged: bool
    start: str
    factors: np.ndarray | None = None

    def to_matrices(self, xp: Backend, shape: MPOShape) -> Array:
        """Build the matrices, (E, out_features, in_features)."""
        experts = max(core.shape[0] for core in self.cores)
        cores = [core if core.shape[0] == experts else core[0] for core in self.cores]
        matrices = to_padded_matrix(xp, cores)[:, : shape.out_features, : shape.in_features]
        if self.factors is None:
            return matrices
        return matrices * xp.from_numpy(self.factors[:, None, None], like=matrices)


@dataclass(frozen=True)
class ChainFinder:
    """The form that chains shall have, and how to look for them.

    Attributes
    ----------
    xp : Backend
        Library of the matrices.
    shape : MPOShape
        Legs of the chains.
    owned : list of int
        Sites whose cores experts own.
    num_experts : int
        Number of experts E.
    center_site : int
        Site of the central core.
    method, max_sweeps, tol
        As for :func:`tnmoe.decompose_shared`.
    form : {"free", "canonical"}
        As for :func:`tnmoe.decompose_shared`.
    refits_owned : bool
        Whether a joint sweep is followed by the best owned cores beside the shared ones: experts
        that count little are small beside the others, and their cores lose digits.
    """

    xp: Backend
    shape: MPOShape
    owned: list[int]
    num_experts: int
    center_site: int
    method: Method
    max_sweeps: int
    tol: float
    form: ChainForm = "free"
    refits_owned: bool = False

    @property
    def takes_limits(self) -> bool:
        """Whether single sweeps find the chains, and choose the bonds on their way."""
        return self.owns_all or (len(self.owned) == 1 and not self.needs_isometries)

    @property
    def needs_isometries(self) -> bool:
        """Whether a sweep is not canonical for every expert: they own other cores than the centre.

        A sweep is so if there is nothing in common.
        """
        is_center = self.owned == [self.center_site]
        return self.form == "canonical" and not self.owns_all and not is_center

    @property
    def owns_all(self) -> bool:
        """Whether chains have nothing in common."""
        return len(self.owned) == self.shape.sites or self.num_experts == 1

    def find(
        self,
        matrices: Array,
        limits: Mapping[str, Any],
        whitening: Whitening | None = None,
        factors: np.ndarray | None = None,
    ) -> Chains:
        """Find the chains of matrices, (E, out_features, in_features).

        Parameters
        ----------
        matrices : array
        limits : mapping
            Arguments of :func:`tnmoe.decompose`; ``bonds`` alone unless :attr:`takes_limits`, or
            where whitening leaves moments.
        whitening : Whitening, optional
            Of the inputs. Plain errors of whitened matrices are weighted errors of the matrices.
        factors : array of float, shape (E,), optional
            In canonical form, where experts cannot scale a shared centre: what every expert's
            chain is multiplied by.
        """
        if self.needs_isometries and self.center_site not in self.owned:
            assert factors is not None
        else:
            factors = np.ones(self.num_experts)
        if whitening is not None:
            finder, moments = replace(self, shape=whitening.whole), None
            if whitening.rest is not None:
                moments = Moments(self.xp, whitening.rest, self.shape.out_dims, self.shape.in_dims)
            chains = finder._of(whitening.apply(matrices), limits, factors, moments)
            return replace(chains, cores=whitening.undo(chains.cores))
        return self._of(matrices, limits, factors)

    def _of(
        self,
        matrices: Array,
        limits: Mapping[str, Any],
        factors: np.ndarray,
        moments: Moments | None = None,
    ) -> Chains:
        if self.needs_isometries:
            fit = partial(fit_canonical, self.xp, center_site=self.center_site, factors=factors)
            return replace(self._fitted(matrices, limits["bonds"], fit), factors=factors)
        if moments is None and self.owns_all:
            return self._by_own_sweeps(matrices, limits)
        if moments is None and len(self.owned) == 1:
            site = self.owned[0]
            sizes = self.shape, site, self.center_site
            cores = joint_sweep(matrices, *sizes, method=self.method, **limits)
            if self.refits_owned:
                cores = with_best_owned(matrices, cores, self.shape, site)
            return Chains(cores, (), True, f"joint sweep at site {site}")
        return self._fitted(
            matrices, limits["bonds"], partial(fit_shared, self.xp, moments=moments)
        )

    def _by_own_sweeps(self, matrices: Array, limits: Mapping[str, Any]) -> Chains:
        if limits.get("max_params") is not None:
            limits = {**limits, "max_params": limits["max_params"] // self.num_experts}
        mpos = decompose_batch(
            matrices, self.shape, center_site=self.center_site, method=self.method, **limits
        )
        cores = [self.xp.stack(each) for each in zip(*(mpo.cores for mpo in mpos), strict=True)]
        return Chains(cores, (), True, "own sweeps")

    def _fitted(self, matrices: Array, bonds: Sequence[int], fit: Fit) -> Chains:
        """Improve all starts a little, and the best of them until it converges."""
        tensor = interleave(self.xp, matrices, self.shape, self.center_site)
        targets = tensor.reshape(self.num_experts, -1)
        best: tuple[SharedFit, str] | None = None
        sizes = self.shape, self.owned, bonds, self.center_site
        for name, cores in starts(matrices, *sizes, method=self.method):
            merged = [core.reshape(*core.shape[:2], -1, core.shape[-1]) for core in cores]
            first = min(_FIRST_SWEEPS, self.max_sweeps)
            found = fit(targets, merged, first, 0.0)
            if best is None or found.error < best[0].error:
                best = found, name
        assert best is not None, "experts own a site"
        found, name = best
        left = max(0, self.max_sweeps - _FIRST_SWEEPS)
        rest = fit(targets, found.cores, left, self.tol)
        # A second fit starts where the first ended, but for rounding.
        history = np.minimum.accumulate([*found.errors, *rest.errors[1:]]).tolist()
        legs = list(zip(self.shape.out_dims, self.shape.in_dims, strict=True))
        cores = [
            core.reshape(*core.shape[:2], *leg, core.shape[-1])
            for core, leg in zip(rest.cores, legs, strict=True)
        ]
        return Chains(cores, tuple(history), rest.converged, name)
