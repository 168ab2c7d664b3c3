"""The structure of a projection: all that its numbers are laid out by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from tnmoe.errors import InputError, check_one_of, short_repr
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.linear import as_linear
from tnmoe.nn.low_rank_projection import LowRankProjection, check_ranks
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Bias, Projection, StackedProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.settings import end_site
from tnmoe.options import STRUCTURES, StructureKind
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO


@dataclass(frozen=True)
class ProjectionStructure:
    """The structure of a projection, from which an empty one of its kind can be made.

    Attributes
    ----------
    kind : {"chains", "hidden", "low_rank", "residual", "stacked"}
        ``chains`` for an :class:`MPOProjection`, ``hidden`` for a :class:`HiddenProjection`,
        ``low_rank`` for a :class:`LowRankProjection`, ``residual`` for a
        :class:`ResidualProjection`, ``stacked`` for whole matrices.
    shape : MPOShape
        Legs of the chains; one site for whole matrices and for those of low rank.
    bond_dims : tuple of int
        Inner bond dimensions of the chains.
    center_site : int
    shared_sites : tuple of int
        Sites whose cores all experts share.
    bias : bool or "common"
    ranks : tuple of int
        Ranks of all experts' matrices, if they are of low rank.

    Raises
    ------
    InputError
        If the kind is unknown, or the ranks do not fit it or the shape.

    Examples
    --------
    >>> matrices = MPOProjection(4, MPOShape((2, 4, 2), (2, 2, 2)), max_bond=3)
    >>> structure = ProjectionStructure.of(matrices)
    >>> structure.kind, structure.bond_dims, structure.shared_sites
    ('chains', (3, 3), (1,))
    >>> structure.build(4).bond_dims == structure.bond_dims
    True
    """

    kind: StructureKind
    shape: MPOShape
    bond_dims: tuple[int, ...] = ()
    center_site: int = 0
    shared_sites: tuple[int, ...] = ()
    bias: Bias = False
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, STRUCTURES)
        check_ranks(self.ranks, self.shape.out_features, self.shape.in_features)
        if bool(self.ranks) != (self.kind == "low_rank"):
            raise InputError(
                f"only matrices of low rank have ranks: got {self.ranks} for {self.kind}"
            )

    @classmethod
    def of(cls, projection: Projection) -> Self:
        """Return the structure of a projection.

        Raises
        ------
        InputError
            If the projection is of a class of its own.
        """
        bias: Bias = projection.bias is not None
        if projection.bias is not None and len(projection.bias) < projection.num_experts:
            bias = "common"
        kinds = {
            StackedProjection: "stacked", MPOProjection: "chains",
            HiddenProjection: "hidden", ResidualProjection: "residual",
            LowRankProjection: "low_rank",
        }  # fmt: skip
        kind: Any = kinds.get(type(projection))
        if kind is None:
            raise InputError(f"a {type(projection).__name__} has no structure that tnmoe knows")
        whole = MPOShape((projection.out_features,), (projection.in_features,))
        if kind == "stacked":
            return cls(kind, whole, bias=bias)
        if isinstance(projection, LowRankProjection):
            return cls(kind, whole, bias=bias, ranks=projection.ranks)
        chains: Any = projection.delta if kind == "residual" else projection
        sites = tuple(sorted(chains.shared_sites))
        return cls(kind, chains.shape, chains.bond_dims, chains.center_site, sites, bias)

    def build(
        self,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Make a projection of this structure, with random numbers.

        Parameters
        ----------
        num_experts : int
            Number of experts E.
        device, dtype : optional
            Device and dtype of the parameters, as for torch's own layers.

        Returns
        -------
        Projection

        Raises
        ------
        InputError
            If bonds or sites do not fit the shape, or ranks are not one per expert.
        """
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        size = self.shape.out_features, self.shape.in_features
        if self.kind == "stacked":
            return StackedProjection(num_experts, *size, bias=self.bias, **place)
        if self.kind == "low_rank":
            return LowRankProjection(num_experts, *size, self.ranks, bias=self.bias, **place)
        chains: dict[str, Any] = {"bond_dims": self.bond_dims, "center_site": self.center_site}
        if self.kind == "hidden":
            return HiddenProjection(num_experts, self.shape, bias=self.bias, **chains, **place)
        chains["shared_sites"] = self.shared_sites
        if self.kind == "chains":
            return MPOProjection(num_experts, self.shape, bias=self.bias, **chains, **place)
        base = nn.Linear(size[1], size[0], bias=False, **place)
        delta = MPOProjection(num_experts, self.shape, **chains, **place)
        return ResidualProjection(base, delta, bias=self.bias)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Make the structure that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If the data describe no structure.
        """
        try:
            entries = dict(data)
            entries["shape"] = MPOShape(**entries["shape"])
            for name in ("bond_dims", "shared_sites", "ranks"):
                entries[name] = tuple(entries.get(name, ()))
            return cls(**entries)
        except (TypeError, KeyError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{short_repr(data)} is not the structure of a projection ({problem})"
            ) from error


def projection_of(shared: SharedMPO) -> Projection:
    """Make a projection of matrices that share cores; it takes over the cores.

    Parameters
    ----------
    shared : SharedMPO
        Of torch tensors. With a base it becomes a :class:`ResidualProjection`. Where experts share
        the central core alone, and that core has all legs of one side, it becomes a
        :class:`HiddenProjection`, which acts once per token.

    Raises
    ------
    InputError
        If the cores are not torch tensors, or there is a single site.
    """
    if shared.base is not None:
        chains = SharedMPO(shared.cores, shared.shape, shared.center_site)
        base = as_linear(shared.base.to_matrix())
        return ResidualProjection(base, MPOProjection.from_shared_mpo(chains))
    projection = MPOProjection.from_shared_mpo(shared)
    if not _fits_hidden(shared):
        return projection
    hidden = HiddenProjection(
        shared.num_experts,
        shared.shape,
        bond_dims=shared.bond_dims,
        center_site=shared.center_site,
        device="meta",
    )
    hidden._store(shared.cores, shared.center_site)
    return hidden


def _fits_hidden(shared: SharedMPO) -> bool:
    if shared.shared_sites != {shared.center_site}:
        return False
    try:
        return end_site(shared.shape, shared.center_site) == shared.center_site
    except InputError:
        return False
