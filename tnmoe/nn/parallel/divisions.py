"""Ways to divide the hidden units of a layer between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from tnmoe.errors import InputError
from tnmoe.nn.experts import Experts
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.linear import has_matrix, is_transposed
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Projection, StackedProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.options import ProjectionName
from tnmoe.shapes import chain_shapes


@dataclass(frozen=True)
class Division:
    """A way to divide the hidden side of one projection.

    Attributes
    ----------
    run : int
        Rank r of R gets the hidden units j with (j // run) % R = r.
    tensors : tuple of (Module, str, int)
        The tensors of which every rank gets a part: the module that holds one, its name there, and
        the axis along which ranks divide it into blocks.
    size : int
        Numbers in these tensors, those of a single expert where experts own them.
    site : int or None
        In a chain, the site whose leg is divided.
    gathers : bool
        Whether ranks divide the rows of a linear module but all need its outputs.
    """

    run: int
    tensors: tuple[tuple[nn.Module, str, int], ...]
    size: int
    site: int | None = None
    gathers: bool = False


def divide(name: str, experts: Experts, ranks: int) -> dict[ProjectionName, Division]:
    """Choose how to divide the hidden units of a layer: such that most numbers are divided.

    Parameters
    ----------
    name : str
        Of the layer, in an error.
    experts : Experts
    ranks : int

    Raises
    ------
    InputError
        If no way gives each rank the same units of all projections.
    """
    projections = experts.projections()
    ways = {name: _by_run(_divisions(each, name, ranks)) for name, each in projections.items()}
    common = set.intersection(*(set(each) for each in ways.values()))
    if not common:
        raise InputError(_describe_failure(name, projections, ranks))
    run = max(common, key=lambda run: (sum(each[run].size for each in ways.values()), run))
    return {name: each[run] for name, each in ways.items()}


def _by_run(divisions: Iterator[Division]) -> dict[int, Division]:
    found: dict[int, Division] = {}
    for each in divisions:
        if each.run not in found or found[each.run].size < each.size:
            found[each.run] = each
    return found


def _divisions(projection: Projection, name: ProjectionName, ranks: int) -> Iterator[Division]:
    """Return the ways to divide a projection."""
    kinds: dict[type, Callable[..., Iterator[Division]]] = {
        StackedProjection: _of_stack,
        MPOProjection: _of_chain,
        HiddenProjection: _of_hidden,
        ResidualProjection: _of_residual,
    }
    kind = kinds.get(type(projection))
    return iter(()) if kind is None else kind(projection, name, ranks)


def _of_stack(
    projection: StackedProjection, name: ProjectionName, ranks: int
) -> Iterator[Division]:
    size = projection.out_features * projection.in_features
    axis = 2 if name == "down" else 1
    for _, run in _runs((hidden_size(projection, name),), name, ranks):
        yield Division(run, ((projection, "stacked", axis),), size)


def _of_chain(chain: MPOProjection, name: ProjectionName, ranks: int) -> Iterator[Division]:
    legs = hidden_legs(chain, name)
    if prod(legs) > hidden_size(chain, name):
        return
    sizes = chain_shapes(chain.shape, chain.bond_dims)
    for site, run in _runs(legs, name, ranks):
        owned = 0 if site == chain.center_site and site in chain.shared_sites else 1
        axis = owned + (2 if name == "down" else 1)
        yield Division(run, ((chain, chain._names[site], axis),), prod(sizes[site]), site)


def _of_hidden(chain: HiddenProjection, name: ProjectionName, ranks: int) -> Iterator[Division]:
    """Divide the module along the leg that its rows or columns begin with, or a core.

    A bond comes before the outputs of the module if it acts first: then ranks divide the bond, and
    gather what the module makes of tokens.
    """
    axis = 1 if name == "down" else 0
    begins_with_bond = name != "down" and chain.center_site > 0
    rows = chain.bond_dims[-1] * chain.shape.out_dims[-1]
    size = prod(chain_shapes(chain.shape, chain.bond_dims)[chain.center_site])
    for each in _of_chain(chain, name, ranks):
        is_base = each.site == chain.center_site
        if is_base and not begins_with_bond and has_matrix(chain.base):
            yield replace(each, tensors=(_in_base(chain, axis),))
        elif not is_base and begins_with_bond and has_matrix(chain.base) and rows % ranks == 0:
            tensors = (*each.tensors, _in_base(chain, 0))
            yield replace(each, tensors=tensors, size=each.size + size, gathers=True)
        elif not is_base:
            yield each


def _of_residual(
    projection: ResidualProjection, name: ProjectionName, ranks: int
) -> Iterator[Division]:
    if not has_matrix(projection.base):
        return
    size = projection.out_features * projection.in_features
    of_base = _in_base(projection, 1 if name == "down" else 0)
    runs = {run for _, run in _runs((hidden_size(projection, name),), name, ranks)}
    for each in _of_chain(projection.delta, name, ranks):
        if each.run in runs:
            yield replace(each, tensors=(*each.tensors, of_base), size=each.size + size)


def _in_base(
    projection: HiddenProjection | ResidualProjection, axis: int
) -> tuple[nn.Module, str, int]:
    return projection.base, "weight", 1 - axis if is_transposed(projection.base) else axis


def _runs(legs: Sequence[int], name: ProjectionName, ranks: int) -> Iterator[tuple[int, int]]:
    """Return the legs that ranks can divide into blocks, with the runs that this gives them."""
    # A rank needs the same units of both halves of gate_up.
    halves = 2 if name == "gate_up" else 1
    for site, leg in enumerate(legs):
        if leg % ranks == 0 and prod(legs[:site]) % halves == 0:
            yield site, prod(legs[site:]) // ranks


def hidden_legs(chain: MPOProjection, name: ProjectionName) -> tuple[int, ...]:
    """Return the legs of a chain on the hidden side."""
    return chain.shape.in_dims if name == "down" else chain.shape.out_dims


def hidden_size(projection: Projection, name: ProjectionName) -> int:
    """Return the size of a projection's matrices on the hidden side."""
    return projection.in_features if name == "down" else projection.out_features


def _describe_failure(
    layer: str, projections: Mapping[ProjectionName, Projection], ranks: int
) -> str:
    described = ", ".join(f"{name} {_describe(each, name)}" for name, each in projections.items())
    return (
        f"{ranks} ranks cannot divide the hidden units of {layer}: {described}. They must divide a "
        "leg of every projection such that the product of this leg and those after it is the same "
        "for all"
    )


def _describe(projection: Projection, name: ProjectionName) -> str:
    chain = projection.delta if isinstance(projection, ResidualProjection) else projection
    if isinstance(projection, HiddenProjection | ResidualProjection) and not has_matrix(
        projection.base
    ):
        return f"has a {type(projection.base).__name__}"
    if isinstance(chain, MPOProjection):
        legs = hidden_legs(chain, name)
        size = hidden_size(chain, name)
        return f"has the legs {legs}" + (f", padded from {size}" if prod(legs) > size else "")
    if type(projection) is StackedProjection:
        return f"has {hidden_size(projection, name)}"
    return f"is a {type(projection).__name__}"
