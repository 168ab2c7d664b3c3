"""What an upcycled model looks like: enough to rebuild its structure from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from inspect import signature
from typing import Any

import torch

from tnmoe.errors import (
    InputError,
    flag,
    integer_from_zero,
    number_in,
    one_of,
    plain,
    positive_int,
    shown,
)
from tnmoe.hf.families import check_layers
from tnmoe.nn.settings import (
    SharedSites,
    check_matrices,
    layout_shape,
    per_projection,
    resolve_shared_sites,
)
from tnmoe.nn.routing.expert_choice import ExpertChoiceRouter
from tnmoe.nn.routing.router import Router, TopKRouter
from tnmoe.options import (
    ANY_LAYOUTS,
    GAUGES,
    MATRICES,
    ROUTER_KINDS,
    AnyLayout,
    Gauge,
    Matrix,
    RouterKind,
)
from tnmoe.shapes import MPOShape

Size = tuple[int, int]

_ROUTERS: Mapping[str, type[Router]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
}


# Of a layer; a router's logits of a thousand tokens then have 4 GB.
_MOST_EXPERTS = 2**20


@dataclass(frozen=True)
class MPOEConfig:
    """How feed-forward networks become mixtures of experts.

    Parameters
    ----------
    num_experts : int
        Experts per layer, 2²⁰ at most.
    num_experts_per_tok : int
        Experts per token; on average, if experts choose.
    layout : {"interleaved", "split", "dense"}
        How matrices split over sites, as for :class:`tnmoe.nn.MPOExperts`; ``dense`` shares
        nothing: an ordinary mixture, for comparison.
    sites : int
        Sites of interleaved shapes.
    max_bond : int, or mapping from "up", "gate", "down" to int or None, optional
        Largest bond dimension, of all matrices or of each. The default, exact bonds, preserves
        the model's function; pretrained matrices compress badly.
    shared_sites : {"center", "none"}, sequence of int, or mapping
        Sites whose cores all experts of a layer share; see :class:`tnmoe.nn.MPOExperts`.
    matrices : sequence of "up", "gate", "down"
        Which matrices become MPOs; every expert has a copy of the others.
    common_bias : bool
        Keep the pretrained biases once for all experts, and not a copy for each.
    layers : sequence of int, or str, optional
        Which of the feed-forward networks to convert, counted as :func:`find_ffns` lists them, or a
        regular expression to look for in their names (``"encoder"``); all by default.
    every : int
        Of those, convert the last of each so many: 2 is every second.
    shapes : mapping from (out, in) to MPOShape
        Shapes for matrices of these sizes instead of the layout's.
    gauge : {"identity", "schmidt"}
        How auxiliary cores start where bonds are exact; see :meth:`tnmoe.nn.MPOExperts.from_dense`.
    expert_noise : float
        Noise on every expert's auxiliary cores at the start, relative to each core's size. 0
        keeps the model's function exactly; experts then differ once their tokens do.
    router_kind : {"top_k", "expert_choice"}
        Whether tokens choose experts or experts tokens.
    router : mapping
        Settings of :class:`tnmoe.nn.TopKRouter` or :class:`tnmoe.nn.ExpertChoiceRouter` by name:
        ``{"jitter_noise": 0.01, "capacity_factor": 1.25}``.
    balance_weight, z_weight : float
        In training, what a converted model adds to its loss: so many times the load-balancing
        loss and the z-loss of its routers, means over layers.
    mask_probability : float
        Probability with which a training step leaves the central tensors alone. It is kept with
        the model, and acts where training is given a mask: :class:`GradientMaskCallback` takes it
        by default, :class:`tnmoe.nn.GradientMask` as its argument.

    Raises
    ------
    InputError
        If a value is out of range.

    Examples
    --------
    >>> config = MPOEConfig(num_experts=4, num_experts_per_tok=2, router={"jitter_noise": 0.01})
    >>> config.num_experts, config.layout
    (4, 'interleaved')
    """

    num_experts: int = 8
    num_experts_per_tok: int = 1
    layout: AnyLayout = "interleaved"
    sites: int = 5
    max_bond: int | Mapping[str, int | None] | None = None
    shared_sites: SharedSites | Mapping[str, SharedSites] = "center"
    matrices: Sequence[Matrix] = MATRICES
    common_bias: bool = False
    layers: Sequence[int] | str | None = None
    every: int = 1
    shapes: Mapping[Size, MPOShape] = field(default_factory=dict)
    gauge: Gauge = "identity"
    expert_noise: float = 0.0
    router_kind: RouterKind = "top_k"
    router: Mapping[str, Any] = field(default_factory=dict)
    balance_weight: float = 0.01
    z_weight: float = 0.0
    mask_probability: float = 0.0

    def __post_init__(self) -> None:
        # One form of what may be given in several: equal configurations are equal, also in JSON.
        settle = partial(object.__setattr__, self)
        for name in ("num_experts", "num_experts_per_tok", "sites", "every"):
            settle(name, positive_int(name, getattr(self, name)))
        if self.num_experts > _MOST_EXPERTS:
            raise InputError(
                f"num_experts must be at most {_MOST_EXPERTS}, got {shown(self.num_experts)}"
            )
        settle("max_bond", _of_each("max_bond", self.max_bond, _bond))
        settle("shared_sites", _of_each("shared_sites", self.shared_sites, _sites))
        settle("layers", check_layers(self.layers))
        settle("common_bias", flag("common_bias", self.common_bias))
        settle("matrices", check_matrices(self.matrices))
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"num_experts={self.num_experts}"
            )
        one_of("layout", self.layout, ANY_LAYOUTS)
        one_of("gauge", self.gauge, GAUGES)
        settle("mask_probability", number_in("mask_probability", self.mask_probability, "[0, 1]"))
        for name in ("expert_noise", "balance_weight", "z_weight"):
            settle(name, number_in(name, getattr(self, name), "[0, inf)"))
        for name in ("shapes", "router"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name} must be a mapping, got {shown(getattr(self, name))}")
        for size, shape in self.shapes.items():
            if not isinstance(shape, MPOShape):
                raise InputError(f"shapes[{size}] must be an MPOShape, got {shape!r}")
            if tuple(size) != (shape.out_features, shape.in_features):
                raise InputError(f"shapes[{size}] is for another matrix: {shape}")

        one_of("router_kind", self.router_kind, ROUTER_KINDS)
        self.make_router(1, device="meta")
        forms = signature(_ROUTERS[self.router_kind]).parameters
        settle(
            "router",
            {name: _like(forms[name].default, value) for name, value in self.router.items()},
        )

    def make_router(
        self,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """A new router for a layer.

        Parameters
        ----------
        hidden_size : int
            Size H of the layer's tokens.
        device, dtype : optional
            As for :class:`tnmoe.nn.TopKRouter`.

        Raises
        ------
        InputError
            If a router has no such setting, or not with that value.
        """
        make = _ROUTERS[self.router_kind]
        settings: dict[str, Any] = {"top_k": self.num_experts_per_tok}
        if self.router_kind == "expert_choice":
            settings = {"capacity_factor": self.num_experts_per_tok}
        known = set(signature(make).parameters) - {
            "hidden_size", "num_experts", "top_k", "device", "dtype",
        }  # fmt: skip
        if unknown := sorted(set(self.router) - known):
            raise InputError(
                f"router has no settings {', '.join(unknown)}; known ones are "
                f"{', '.join(sorted(known))}"
            )
        settings |= self.router
        return make(hidden_size, self.num_experts, device=device, dtype=dtype, **settings)

    def shape_for(self, out_features: int, in_features: int) -> MPOShape:
        """Shape of a matrix of size (``out_features``, ``in_features``)."""
        given = self.shapes.get((out_features, in_features))
        return given or layout_shape(self.layout, out_features, in_features, self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data |= {name: _plain(data[name]) for name in ("layers", "shared_sites", "matrices")}
        data |= {
            name: dict(data[name])
            for name in ("router", "max_bond")
            if isinstance(data[name], Mapping)
        }
        data["shapes"] = [asdict(shape) for shape in self.shapes.values()]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MPOEConfig:
        """The configuration that :meth:`to_dict` described.

        Parameters
        ----------
        data : mapping
            Entries that are missing have their defaults.

        Raises
        ------
        InputError
            If an entry is unknown or out of range.
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := set(data) - known:
            raise InputError(f"unknown entries in an MPOE configuration: {sorted(unknown)}")
        shapes = _shapes(data.get("shapes", ()))
        by_size = {(shape.out_features, shape.in_features): shape for shape in shapes}
        return cls(**{**data, "shapes": by_size})


def _of_each(name: str, value: Any, settled: Callable[[Any], Any]) -> Any:
    """A setting of all projections, or of some, in its one form."""
    per_projection(name, value, None)
    if isinstance(value, Mapping):
        return {key: settled(entry) for key, entry in value.items()}
    return settled(value)


def _bond(bond: Any) -> int | None:
    return None if bond is None else positive_int("max_bond", bond)


def _sites(shared_sites: Any) -> str | tuple[int, ...]:
    """Sites as far as they can be known before their number is."""
    if isinstance(shared_sites, str) or not isinstance(shared_sites, Iterable):
        resolve_shared_sites(shared_sites, sites=2, center_site=0)
        return shared_sites
    name = f"every site of shared_sites={shown(shared_sites)}"
    return tuple(sorted({integer_from_zero(name, site) for site in shared_sites}))


def _like(default: Any, value: Any) -> Any:
    """A router's setting, which it has taken, as a number of the kind that its default is of."""
    if value is None:
        return None
    # Nothing by default: a capacity.
    return (float if default is None else type(default))(plain(value))


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _shapes(data: Any) -> list[MPOShape]:
    """Shapes from plain data."""
    try:
        return [MPOShape(**shape) for shape in data]
    except TypeError:
        raise InputError(
            f"shapes must be a list of objects with out_dims and in_dims, got {data!r}"
        ) from None
