"""The choice among the routes from rows to their products with experts' matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnmoe.contraction.plan import ContractionPlan, contraction_plan
from tnmoe.errors import InputError, check_one_of
from tnmoe.nn.compute.cache import cached_linear, weight_cache
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.joint import joint_linear, tied_joint_linear
from tnmoe.nn.compute.per_expert import per_expert_linear
from tnmoe.nn.compute.rebuilt import rebuilt_linear
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.transforms import has_values, needs_native_operators
from tnmoe.options import ROUTES, ProjectionName, Route

# They take padded rows; the route ``cached`` needs no padding.
_KERNELS: dict[str, Callable[[Tensor, ExpertCores, Groups], Tensor]] = {
    "joint": joint_linear,
    "per_expert": per_expert_linear,
    "rebuilt": rebuilt_linear,
}


def plan(
    cores: ExpertCores,
    rows: int,
    training: bool,
    *,
    matrix: ProjectionName | None = None,
    top_k: int = 1,
    route: Route | None = None,
) -> ContractionPlan:
    """Plan the fastest route for a number of rows.

    Parameters
    ----------
    cores : ExpertCores
    rows : int
        Slots of all experts together.
    training : bool
        Whether a backward pass follows, for which no matrices are kept.
    matrix : {"gate_up", "gate", "up", "down"}, optional
        The place of the matrices in a layer where shared cores may act once per token.
    top_k : int
        Slots per token.
    route : {"joint", "per_expert", "rebuilt", "cached"}, optional
        The route to plan; the fastest by default.
    """
    center = cores.center
    itemsize = center.element_size()
    return contraction_plan(
        cores.shape,
        cores.bond_dims,
        rows,
        experts=cores.num_experts,
        center_site=cores.center_site,
        shared_sites=cores.shared_sites,
        matrix=matrix,
        top_k=top_k,
        route=route,
        training=training,
        cached=not training
        and not cores.transient
        and not needs_native_operators()
        and weight_cache.can_keep(cores, itemsize),
        device=center.device.type,
        itemsize=itemsize,
    )


def choose_route(cores: ExpertCores, rows: Tensor, groups: Groups) -> str:
    """Return the route that is planned for all slots of the layer.

    Code that is compiled, or that computes no numbers, gets a route that suits any number of rows.
    """
    training = cores.needs_gradients(rows)
    compiling = torch.compiler.is_compiling()
    if not compiling and has_values(rows):
        return plan(cores, groups.layer_slots, training).route
    if cores.shape.is_split(cores.center_site):
        return "joint"
    return "cached" if compiling and not training else "rebuilt"


def expert_linear(
    rows: Tensor, cores: ExpertCores, groups: Groups, route: Route | None = None
) -> Tensor:
    """Multiply rows by their experts' matrices.

    Parameters
    ----------
    rows : Tensor, shape (N, in)
        In the order of experts.
    cores : ExpertCores
        In any dtype.
    groups : Groups
        Which rows belong to which expert.
    route : {"joint", "per_expert", "rebuilt", "cached"}, optional
        The planned one by default.

    Returns
    -------
    Tensor, shape (N, out)

    Raises
    ------
    InputError
        If the route is unknown, or ``cached`` where gradients are needed.
    """
    check_one_of("route", route, (*ROUTES, None))
    chosen = route or choose_route(cores, rows, groups)
    if chosen == "cached" and cores.transient:
        chosen = "rebuilt"
    if chosen == "cached":
        if route:
            _refuse_gradients(cores, rows)
        return cached_linear(rows, cores, groups)
    result = _KERNELS[chosen](cores.pad(rows), cores, groups)
    return result[:, : cores.shape.out_features]


def tied_linear(
    rows: Tensor, first: ExpertCores, second: ExpertCores, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Multiply the same rows by the matrices of two projections of one shape, route ``joint``.

    The last cores that the projections have in common are contracted once.
    """
    products = tied_joint_linear(first.pad(rows), [first, second], groups)
    one, two = (product[:, : first.shape.out_features] for product in products)
    return one, two


def _refuse_gradients(cores: ExpertCores, rows: Tensor) -> None:
    if needs_native_operators():
        raise InputError("route='cached' has no derivatives: set another route, or None")
    if cores.needs_gradients(rows):
        raise InputError("route='cached' has no gradients: use it under torch.no_grad()")
