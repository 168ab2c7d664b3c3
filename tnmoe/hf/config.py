"""The configuration of a conversion: enough to rebuild a model's structure from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from typing import Any

import torch

from tnmoe.errors import (
    InputError,
    check_bool,
    check_entries,
    check_int_from_zero,
    check_number_in,
    check_one_of,
    check_positive_int,
    short_repr,
    to_python_scalar,
)
from tnmoe.factors import number_of_sites
from tnmoe.hf.find import check_layers
from tnmoe.nn.routing.expert_choice import ExpertChoiceRouter
from tnmoe.nn.routing.router import Router
from tnmoe.nn.routing.top_k import TopKRouter
from tnmoe.nn.settings import (
    GROUP_SIZE,
    check_bond_ratio,
    check_matrices,
    check_shared_sites,
    check_sites_and_groups,
    layout_shape,
    per_projection,
)
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
from tnmoe.shapes import MPOShape, SharedSites, resolve_shared_sites

Size = tuple[int, int]

# Settings that may be sequences, which JSON has as lists.
_SEQUENCES = ("layers", "shared_sites", "matrices", "group_size")

_ROUTERS: Mapping[str, type[Router]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
}

# With this many experts per layer, a router's logits of a thousand tokens take 4 GB.
_MAX_EXPERTS = 2**20


@dataclass(frozen=True)
class MPOEConfig:
    """Settings for converting feed-forward networks into mixtures of experts.

    Parameters
    ----------
    num_experts : int
        Experts per layer, 2²⁰ at most.
    num_experts_per_tok : int
        Experts per token. If experts choose tokens, this is the average.
    layout : {"interleaved", "split", "hidden", "residual", "dense"}
        What experts share and own, as for :class:`tnmoe.nn.MPOExperts`. In ``residual`` and, at
        exact bonds, in ``hidden`` experts share the model's own linear module as it stands.
        ``dense`` makes an ordinary mixture whose experts share nothing, for comparison; it ignores
        the settings of MPOs.
    sites : int, optional
        Number of sites of interleaved shapes, 5 by default, or of residual ones, 2 by default.
        Other layouts take ``group_size``.
    group_size : int or sequence of int
        Groups of split and hidden shapes, one site per number. A single number stands for its
        greatest common divisor with the size that it divides.
    bond_ratio : float
        How many matrices the shared core of a split or hidden shape holds, from 1 to
        ``num_experts``. Bonds must be exact.
    max_bond : int, or mapping from "up", "gate", "down" to int or None, optional
        Largest bond dimension, for all matrices or by matrix. The default, exact bonds, preserves
        the model's function. Smaller bonds cost accuracy: pretrained matrices compress badly. In
        ``residual`` every bond preserves the function, and the default is 16.
    shared_sites : {"center", "none"}, sequence of int, or mapping, optional
        Sites whose cores all experts of a layer share; see :class:`tnmoe.nn.MPOExperts`. In
        ``hidden`` that is the central one.
    matrices : sequence of "up", "gate", "down"
        Matrices that become MPOs. Of the remaining matrices every expert has a copy.
    common_bias : bool
        Keep the pretrained biases once for all experts. By default every expert has a copy, or,
        where experts share a module, a bias beside the module's, which starts at zero.
    layers : sequence of int, or str, optional
        Feed-forward networks to convert: positions in the list of :func:`find_ffns`, or a regular
        expression to search for in their names (``"encoder"``). All by default.
    every : int
        Of these networks, convert every ``every``-th: with 2 the second, the fourth and so on.
    shapes : mapping from (out, in) to MPOShape
        Shapes for matrices of these sizes, instead of the layout's.
    gauge : {"identity", "schmidt"}
        How auxiliary cores start if bonds are exact; see :meth:`tnmoe.nn.MPOExperts.from_dense`.
        Where experts share a module, its matrix stays as it is.
    expert_noise : float
        Noise on every expert's own cores at the start, relative to each core's root mean square,
        or in ``residual`` the norm of every expert's MPO relative to that of the matrix. With 0 the
        model's function stays the same, and experts differ once they have trained on different
        tokens.
    router_kind : {"top_k", "expert_choice"}
        Whether tokens choose experts (``top_k``) or experts choose tokens.
    router : mapping
        Further settings of :class:`tnmoe.nn.TopKRouter` or :class:`tnmoe.nn.ExpertChoiceRouter`:
        ``{"jitter_noise": 0.01, "capacity_factor": 1.25}``.
    balance_weight, z_weight : float
        Weights of the load-balancing loss and the z-loss of routers. In training, a converted
        model adds both, as means over layers, to its loss.
    mask_probability : float
        Probability that a training step leaves shared cores as they are. It is stored with the
        model and does nothing by itself: :class:`GradientMaskCallback` reads it by default, and
        :class:`tnmoe.nn.GradientMask` takes it as an argument.

    Raises
    ------
    InputError
        If a value is out of range, or the layout cannot use it.

    Examples
    --------
    >>> config = MPOEConfig(num_experts=4, num_experts_per_tok=2, router={"jitter_noise": 0.01})
    >>> config.num_experts, config.layout
    (4, 'interleaved')
    """

    num_experts: int = 8
    num_experts_per_tok: int = 1
    layout: AnyLayout = "interleaved"
    sites: int | None = None
    group_size: int | Sequence[int] = GROUP_SIZE
    bond_ratio: float = 1.0
    max_bond: int | Mapping[str, int | None] | None = None
    shared_sites: SharedSites | Mapping[str, SharedSites] | None = None
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
        # Every field is stored in one form, so that configurations of the same meaning are equal,
        # also after a round trip through JSON.
        self._set_counts()
        for name, check in (("max_bond", _check_bond), ("shared_sites", _check_sites)):
            self._set(name, _check_per_projection(name, getattr(self, name), check))
        self._set("layers", check_layers(self.layers))
        self._set("common_bias", check_bool("common_bias", self.common_bias))
        self._set("matrices", check_matrices(self.matrices))
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"num_experts={self.num_experts}"
            )
        check_one_of("layout", self.layout, ANY_LAYOUTS)
        check_one_of("gauge", self.gauge, GAUGES)
        for name, interval in (
            ("bond_ratio", "[1, inf)"),
            ("mask_probability", "[0, 1]"),
            ("expert_noise", "[0, inf)"),
            ("balance_weight", "[0, inf)"),
            ("z_weight", "[0, inf)"),
        ):
            self._set(name, check_number_in(name, getattr(self, name), interval))
        for name in ("shapes", "router"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name} must be a mapping, got {short_repr(getattr(self, name))}")
        self._check_shapes()
        self._check_layout()
        self._set_router()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_counts(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "every"):
            self._set(name, check_positive_int(name, getattr(self, name)))
        self._set("sites", _check_number_of_sites(self.sites))
        self._set("group_size", _check_group_size(self.group_size))
        if self.num_experts > _MAX_EXPERTS:
            raise InputError(
                f"num_experts must be at most {_MAX_EXPERTS}, got {short_repr(self.num_experts)}"
            )

    def _check_shapes(self) -> None:
        for size, shape in self.shapes.items():
            if not isinstance(shape, MPOShape):
                raise InputError(f"shapes[{size}] must be an MPOShape, got {shape!r}")
            if tuple(size) != (shape.out_features, shape.in_features):
                raise InputError(f"shapes[{size}] is for another matrix: {shape}")

    def _check_layout(self) -> None:
        """Check that the layout can use the other settings; an ordinary mixture ignores them."""
        if self.layout == "dense":
            return
        check_sites_and_groups(self.layout, self.sites, self.group_size)
        bonds = per_projection("max_bond", self.max_bond, None)
        shared = per_projection("shared_sites", self.shared_sites, None)
        if self.bond_ratio > self.num_experts:
            raise InputError(
                f"bond_ratio must be at most num_experts={self.num_experts}, with which experts "
                f"share nothing any more, got {self.bond_ratio}"
            )
        for name in self.matrices:
            check_bond_ratio(self.layout, self.bond_ratio, bonds[name])
            check_shared_sites(self.layout, shared[name])

    def _set_router(self) -> None:
        check_one_of("router_kind", self.router_kind, ROUTER_KINDS)
        self.make_router(1, device="meta")  # raises if a setting is wrong
        parameters = signature(_ROUTERS[self.router_kind]).parameters
        router = {
            name: _as_default_type(parameters[name].default, value)
            for name, value in self.router.items()
        }
        self._set("router", router)

    def make_router(
        self,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """Make a router for a layer.

        Parameters
        ----------
        hidden_size : int
            Size H of the layer's tokens.
        device, dtype : optional
            As for :class:`tnmoe.nn.TopKRouter`.

        Raises
        ------
        InputError
            If a setting is unknown, or its value out of range.
        """
        router_class = _ROUTERS[self.router_kind]
        settings: dict[str, Any] = {"top_k": self.num_experts_per_tok}
        if self.router_kind == "expert_choice":
            settings = {"capacity_factor": self.num_experts_per_tok}
        known = set(signature(router_class).parameters) - {
            "hidden_size", "num_experts", "top_k", "device", "dtype",
        }  # fmt: skip
        if unknown := sorted(set(self.router) - known):
            raise InputError(
                f"router has no settings {', '.join(unknown)}; known ones are "
                f"{', '.join(sorted(known))}"
            )
        settings |= self.router
        return router_class(hidden_size, self.num_experts, device=device, dtype=dtype, **settings)

    def shape_for(self, name: str, out_features: int, in_features: int) -> MPOShape:
        """Return the shape of the matrix ``name``, of size (``out_features``, ``in_features``)."""
        size = (out_features, in_features)
        return self.shapes.get(size) or layout_shape(
            self.layout, name, size, sites=self.sites, group_size=self.group_size
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data |= {name: _with_lists(data[name]) for name in _SEQUENCES}
        data |= {
            name: dict(data[name])
            for name in ("router", "max_bond")
            if isinstance(data[name], Mapping)
        }
        data["shapes"] = [asdict(shape) for shape in self.shapes.values()]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MPOEConfig:
        """Make the configuration that :meth:`to_dict` described.

        Parameters
        ----------
        data : mapping
            Missing entries have their defaults.

        Raises
        ------
        InputError
            If an entry is unknown or out of range.
        """
        check_entries(data, cls, "an MPOE configuration")
        shapes = _shapes(data.get("shapes", ()))
        by_size = {(shape.out_features, shape.in_features): shape for shape in shapes}
        return cls(**{**data, "shapes": by_size})


def check_config(config: object) -> None:
    """Raise a TypeError unless this is an MPOEConfig."""
    if not isinstance(config, MPOEConfig):
        raise TypeError(f"config must be an MPOEConfig, got {type(config).__qualname__}")


def _check_per_projection(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """Check and return a setting of all projections, or a mapping with one per projection."""
    per_projection(name, value, None)
    if isinstance(value, Mapping):
        return {key: check(entry) for key, entry in value.items()}
    return check(value)


def _check_bond(bond: Any) -> int | None:
    return None if bond is None else check_positive_int("max_bond", bond)


def _check_number_of_sites(sites: Any) -> int | None:
    if sites is None:
        return None
    number = number_of_sites(sites)
    if number < 2:
        raise InputError("sites must be at least 2: experts share one core and own another, got 1")
    return number


def _check_group_size(group_size: Any) -> int | tuple[int, ...]:
    group_size = to_python_scalar(group_size)
    if not isinstance(group_size, Iterable) or isinstance(group_size, str | bytes):
        return check_positive_int("group_size", group_size)
    name = f"every group of group_size={short_repr(group_size)}"
    groups = tuple(check_positive_int(name, size) for size in group_size)
    if not groups:
        raise InputError("group_size must be a number or several, got none")
    return groups


def _check_sites(shared_sites: Any) -> str | tuple[int, ...] | None:
    """Check shared sites as far as possible before the number of sites is known."""
    if shared_sites is None:
        return None
    if isinstance(shared_sites, str) or not isinstance(shared_sites, Iterable):
        resolve_shared_sites(shared_sites, sites=2, center_site=0)
        return shared_sites
    name = f"every site of shared_sites={short_repr(shared_sites)}"
    return tuple(sorted({check_int_from_zero(name, site) for site in shared_sites}))


def _as_default_type(default: Any, value: Any) -> Any:
    """Return a router's setting, which the router accepted, in the type of its default."""
    if value is None:
        return None
    # The only settings whose default is None are capacities, which are floats.
    return (float if default is None else type(default))(to_python_scalar(value))


def _with_lists(value: Any) -> Any:
    """Replace tuples by lists, as in JSON."""
    if isinstance(value, Mapping):
        return {key: _with_lists(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _shapes(data: Any) -> list[MPOShape]:
    """Make shapes from plain data."""
    try:
        return [MPOShape(**shape) for shape in data]
    except TypeError:
        raise InputError(
            f"shapes must be a list of objects with out_dims and in_dims, got {data!r}"
        ) from None
