"""The search for chains of experts that share some cores, at given limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tnmoe.backends import Array, Backend
from tnmoe.chains.interleave import interleave
from tnmoe.chains.moments import Moments
from tnmoe.chains.shared_fit import SharedFit, fit_shared
from tnmoe.chains.whitening import Whitening
from tnmoe.contraction.build import to_padded_matrix
from tnmoe.decompose import decompose_batch
from tnmoe.joint.starts import joint_sweep, starts, with_best_owned
from tnmoe.options import Method
from tnmoe.shapes import MPOShape

# Sweeps after which the best start is chosen.
_FIRST_SWEEPS = 3


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
    """

    cores: list[Array]
    history: tuple[float, ...]
    converged: bool
    start: str

    def to_matrices(self, xp: Backend, shape: MPOShape) -> Array:
        """Build the matrices, (E, out_features, in_features)."""
        experts = max(core.shape[0] for core in self.cores)
        cores = [core if core.shape[0] == experts else core[0] for core in self.cores]
        matrices = to_padded_matrix(xp, cores)
        return matrices[:, : shape.out_features, : shape.in_features]


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
    refits_owned: bool = False

    @property
    def takes_limits(self) -> bool:
        """Whether single sweeps find the chains, and choose the bonds on their way."""
        return self.owns_all or len(self.owned) == 1

    @property
    def owns_all(self) -> bool:
        """Whether chains have nothing in common."""
        return len(self.owned) == self.shape.sites or self.num_experts == 1

    def find(
        self, matrices: Array, limits: Mapping[str, Any], whitening: Whitening | None = None
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
        """
        if whitening is not None:
            finder, moments = replace(self, shape=whitening.whole), None
            if whitening.rest is not None:
                moments = Moments(self.xp, whitening.rest, self.shape.out_dims, self.shape.in_dims)
            chains = finder._of(whitening.apply(matrices), limits, moments)
            return replace(chains, cores=whitening.undo(chains.cores))
        return self._of(matrices, limits)

    def _of(
        self, matrices: Array, limits: Mapping[str, Any], moments: Moments | None = None
    ) -> Chains:
        if moments is not None:
            return self._by_least_squares(matrices, limits["bonds"], moments)
        if self.owns_all:
            return self._by_own_sweeps(matrices, limits)
        if len(self.owned) == 1:
            site = self.owned[0]
            sizes = self.shape, site, self.center_site
            cores = joint_sweep(matrices, *sizes, method=self.method, **limits)
            if self.refits_owned:
                cores = with_best_owned(matrices, cores, self.shape, site)
            return Chains(cores, (), True, f"joint sweep at site {site}")
        return self._by_least_squares(matrices, limits["bonds"])

    def _by_own_sweeps(self, matrices: Array, limits: Mapping[str, Any]) -> Chains:
        if limits.get("max_params") is not None:
            limits = {**limits, "max_params": limits["max_params"] // self.num_experts}
        mpos = decompose_batch(
            matrices, self.shape, center_site=self.center_site, method=self.method, **limits
        )
        cores = [self.xp.stack(each) for each in zip(*(mpo.cores for mpo in mpos), strict=True)]
        return Chains(cores, (), True, "own sweeps")

    def _by_least_squares(
        self, matrices: Array, bonds: Sequence[int], moments: Moments | None = None
    ) -> Chains:
        """Improve all starts a little, and the best of them until it converges."""
        tensor = interleave(self.xp, matrices, self.shape, self.center_site)
        targets = tensor.reshape(self.num_experts, -1)
        best: tuple[SharedFit, str] | None = None
        sizes = self.shape, self.owned, bonds, self.center_site
        for name, cores in starts(matrices, *sizes, method=self.method):
            merged = [core.reshape(*core.shape[:2], -1, core.shape[-1]) for core in cores]
            first = min(_FIRST_SWEEPS, self.max_sweeps)
            fit = fit_shared(self.xp, targets, merged, first, 0.0, moments)
            if best is None or fit.error < best[0].error:
                best = fit, name
        assert best is not None, "experts own a site"
        fit, name = best
        left = max(0, self.max_sweeps - _FIRST_SWEEPS)
        rest = fit_shared(self.xp, targets, fit.cores, left, self.tol, moments)
        history = (*fit.errors, *rest.errors[1:])
        legs = list(zip(self.shape.out_dims, self.shape.in_dims, strict=True))
        found = [
            core.reshape(*core.shape[:2], *leg, core.shape[-1])
            for core, leg in zip(rest.cores, legs, strict=True)
        ]
        return Chains(found, history, rest.converged, name)
