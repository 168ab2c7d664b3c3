"""Layers that share cores with each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from tnmoe.errors import InputError, check_index
from tnmoe.nn.experts import Experts
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.linear import check_same_linear, tie_linear
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.stored_cores import is_gathered
from tnmoe.options import MATRICES


def tie_layers(
    layers: Iterable[nn.Module], sites: Literal["center"] | Iterable[int] = "center"
) -> None:
    """Let layers share cores: one stored tensor then receives the gradients of all layers.

    MPOBERT (Liu et al., arXiv:2303.16753, section 3.1) shares the central tensors of all layers.
    The first layer's values stay. Tie layers before training: layers that were trained on their
    own compute something else afterwards.

    Parameters
    ----------
    layers : iterable of MPOExperts, or of MPOMoE with such experts
        All of the same shapes and bonds. Their up projections are tied to each other, and so are
        their gates and their down projections.
    sites : {"center"} or iterable of int
        Sites whose cores are tied. In the layouts ``hidden`` and ``residual``, ``"center"`` ties
        the linear modules' matrices and leaves their biases; numbers are those of the sites of
        experts' MPOs.

    Raises
    ------
    InputError
        If there are fewer than two layers, a site does not exist, cores differ in shape, or
        layers are sharded or offloaded already. No layer is tied then.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> first, second = (MPOExperts(4, 8, 16, sites=3) for _ in range(2))
    >>> tie_layers([first, second])
    >>> first.up.center is second.up.center, first.up.aux[0] is second.up.aux[0]
    (True, False)
    """
    experts = _check_layers(layers)
    numbers = _check_sites(sites)
    pairs = []
    for name in (*MATRICES, "gate_up"):
        first, *others = (getattr(layer, name) for layer in experts)
        if first is None and all(other is None for other in others):
            continue
        pairs += [(name, first, other) for other in others]
    for name, first, other in pairs:
        _check_pair(name, first, other, numbers)
    for _, first, other in pairs:
        _tie_pair(first, other, numbers)


def _check_layers(layers: Iterable[nn.Module]) -> list[Experts]:
    """Return the layers' experts, or raise an InputError."""
    experts: list[Any] = [getattr(layer, "experts", layer) for layer in layers]
    if len(experts) < 2:
        raise InputError(f"tying needs at least two layers, got {len(experts)}")
    if wrong := [type(layer).__name__ for layer in experts if not isinstance(layer, Experts)]:
        raise InputError(f"layers must be Experts, or an MPOMoE of them, got {', '.join(wrong)}")
    if any(is_gathered(module) for layer in experts for module in layer.modules()):
        raise InputError("layers are sharded or offloaded already: tie them before that")
    return experts


def _check_sites(sites: Literal["center"] | Iterable[int]) -> list[int] | None:
    """Return the sites' numbers; None for the site of the central core."""
    if sites != "center" and (isinstance(sites, str) or not isinstance(sites, Iterable)):
        raise InputError(f"sites must be 'center' or the numbers of sites, got {sites!r}")
    numbers = None if isinstance(sites, str) else sorted(set(sites))
    if numbers == []:
        raise InputError("sites must name at least one site, got none")
    return numbers


def _check_pair(name: str, first: Any, other: Any, sites: list[int] | None) -> None:
    for projection in (first, other):
        if not isinstance(projection, MPOProjection | ResidualProjection):
            raise InputError(f"{name} is not an MPO in one of the layers: {projection}")
    if type(first) is not type(other):
        raise InputError(f"{name} differs in its layout: {first} and {other}")
    chains = _chain_of(first), _chain_of(other)
    if chains[0].shape != chains[1].shape:
        raise InputError(f"{name} differs in its shape: {chains[0].shape} and {chains[1].shape}")
    centers = [chain.center_site for chain in chains]
    if centers[0] != centers[1]:
        raise InputError(f"{name} differs in the site of its centre: {centers[0]} and {centers[1]}")
    for site in [None] if sites is None else sites:
        if _is_module_at(first, site):
            check_same_linear(f"{name}.base", first.base, other.base)
            continue
        site = (
            centers[0] if site is None else check_index("every site", site, chains[0].shape.sites)
        )
        shapes = [tuple(chain.core_at(site).shape) for chain in chains]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{name}'s cores of site {site} differ in shape: {shapes[0]} and {shapes[1]}"
            )


def _tie_pair(first: Any, other: Any, sites: list[int] | None) -> None:
    """Let a projection use another one's cores; None stands for the centre, or for ``base``."""
    for site in [None] if sites is None else sites:
        if _is_module_at(first, site):
            tie_linear(first.base, other.base)
        else:
            chain, tied = _chain_of(first), _chain_of(other)
            number = chain.center_site if site is None else site
            tied.set_core(number, chain.core_at(number))
            for each in (chain, tied):
                each._tied_sites |= {number}


def _chain_of(projection: Any) -> MPOProjection:
    return projection.delta if isinstance(projection, ResidualProjection) else projection


def _is_module_at(projection: Any, site: int | None) -> bool:
    """Return whether a linear module holds what layers share at a site, None for the centre."""
    if isinstance(projection, HiddenProjection):
        return site in (None, projection.center_site)
    return isinstance(projection, ResidualProjection) and site is None
