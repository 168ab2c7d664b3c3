"""Contraction plans: how to apply a chain or experts to vectors, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from tnmoe.contraction.expert_routes import (
    ChainCost,
    Workload,
    flops_and_peak,
    once_per_token_sites,
    predict_seconds,
)
from tnmoe.contraction.paths import Path, applying_path, building_path
from tnmoe.contraction.pieces import peak_in_pieces
from tnmoe.contraction.rates import Rates, get_rates
from tnmoe.errors import InputError, check_int_from_zero, check_one_of, check_positive_int
from tnmoe.options import PROJECTIONS, ROUTES, OperatorRoute, ProjectionName, Route
from tnmoe.shapes import MPOShape, chain_shapes, resolve_center_site, resolve_shared_sites
from tnmoe.system.tables import format_table

# Array libraries count the entries along an axis in 64-bit integers with a sign.
_TOO_LARGE = 2**63


@dataclass(frozen=True)
class ContractionPlan:
    """A way to apply an MPO, or experts that share a core, to vectors, and its cost.

    Attributes
    ----------
    route : {"chain", "rebuilt"}, or for experts {"joint", "per_expert", "rebuilt", "cached"}
        ``chain`` contracts the vectors with the cores. ``rebuilt`` builds the matrix first.
        ``joint`` takes the vectors of all experts together through the cores, from the right.
        ``per_expert`` takes each expert's own vectors through its cores. ``cached`` multiplies
        with matrices that are in memory.
    flops : int
        Floating-point operations of a forward pass; a multiply-add counts as two.
    peak_elements : int
        Entries of the largest intermediate array. Where vectors go through in pieces, of a piece.
    path : tuple of tuple of int
        Pairwise contractions in opt_einsum's form. The operands are (vectors, cores…) on the
        routes ``chain`` and ``per_expert``, and (cores…) on ``rebuilt`` for one MPO. Empty on the
        other routes.
    seconds : dict
        For experts: predicted seconds of every possible route.

    Examples
    --------
    >>> from tnmoe import MPOShape, contraction_plan
    >>> plan = contraction_plan(MPOShape((4, 4, 4), (4, 4, 4)), (2, 2), batch=8)
    >>> plan.route, plan.path
    ('chain', ((0, 3), (1, 2), (0, 1)))
    """

    route: Route | OperatorRoute
    flops: int
    peak_elements: int
    path: Path
    seconds: dict[Route, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        text = (
            f"route {self.route}: {self.flops:.3g} flops, "
            f"largest intermediate {self.peak_elements:.3g} numbers"
        )
        if not self.seconds:
            steps = " ".join("·".join(map(str, step)) for step in self.path)
            return f"{text}, path {steps or 'none'}"
        ranking = sorted(self.seconds.items(), key=lambda item: item[1])
        rows = [[name, f"{1e3 * seconds:.3f}"] for name, seconds in ranking]
        return f"{text}\n{format_table(['route', 'predicted ms'], rows)}"


def contraction_plan(
    shape: MPOShape,
    bond_dims: tuple[int, ...] | None = None,
    batch: int = 1,
    *,
    experts: int | None = None,
    center_site: int | None = None,
    shared_sites: Iterable[int] | None = None,
    matrix: ProjectionName | None = None,
    top_k: int = 1,
    route: Route | None = None,
    training: bool = False,
    cached: bool = False,
    device: str = "cpu",
    itemsize: int = 4,
) -> ContractionPlan:
    """Find the cheapest way to apply an MPO, or experts that share its centre, to vectors.

    For one MPO the plan has the fewest operations. For experts it is the fastest according to a
    model of operations, bytes and launches on a device.

    Parameters
    ----------
    shape : MPOShape
        Legs of the MPO.
    bond_dims : tuple of int, optional
        Inner bond dimensions; they may be larger than a matrix needs. Exact bonds by default.
    batch : int
        Number of vectors; of all experts together.
    experts : int, optional
        Number of experts that share cores. Without it the plan is for one MPO.
    center_site : int, optional
        Site of the central core; ``shape.center_site`` by default.
    shared_sites : iterable of int, optional
        Sites whose cores the experts share, not all of them; the central one by default.
    matrix : {"gate_up", "gate", "up", "down"}, optional
        The place of the matrices in a layer. Shared cores that act before tokens are dispatched to
        their experts, or after the experts' outputs are summed, then act once per token. By
        default they act once per vector.
    top_k : int
        Experts per token: the vectors belong to ``batch / top_k`` tokens.
    route : {"joint", "per_expert", "rebuilt", "cached"}, optional
        For experts: the route to plan; the fastest by default.
    training : bool
        Whether a backward pass will follow.
    cached : bool
        Whether the experts' matrices are in memory, or may stay there once they are built.
    device : str
        Kind of device, ``"cpu"`` or ``"cuda"``. Any other kind counts as ``"cuda"`` unless it has
        rates of its own.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    ContractionPlan
        For up to 8 sites its path is the best of all pairwise contractions without outer products
        (opt_einsum's dynamic programming; Pfeifer, Haegeman, Verstraete, Phys. Rev. E 90, 033315
        (2014)) at batches of powers of two. Between two powers it is the cheaper of their paths.
        For more sites it is the best of those paths that always have contracted either one run of
        neighbouring sites or all sites but one such run. From 33 sites on, neighbours whose
        product is no larger than themselves are multiplied first.

    Raises
    ------
    InputError
        If the number of bonds does not fit the sites, ``center_site`` is not one of the sites, a
        count is not an integer in its range, or a size is 2⁶³ or more.

    Examples
    --------
    >>> shape = MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    >>> contraction_plan(shape, (4, 4, 4, 4), batch=1).route
    'chain'
    >>> contraction_plan(shape, batch=64).route
    'rebuilt'
    >>> split = MPOShape.split(3072, 768, 64, 64)
    >>> contraction_plan(split, batch=64, experts=8, training=True).route
    'joint'
    """
    bonds = shape.bond_dims() if bond_dims is None else tuple(bond_dims)
    if len(bonds) != shape.sites - 1:
        raise InputError(
            f"bond_dims needs one value per bond: got {bonds} for {shape.sites - 1} bonds"
        )
    for bond in bonds:
        check_positive_int("every bond dimension", bond)
    batch = check_int_from_zero("batch", batch)
    itemsize = check_positive_int("itemsize", itemsize)
    if max(shape.padded_out, shape.padded_in, batch, *bonds) >= _TOO_LARGE:
        raise InputError("a plan is for a matrix, bonds and a batch of less than 2**63 each")
    center_site = resolve_center_site(shape, center_site)
    if experts is None:
        plan = plan_for_chain(shape, bonds, batch)
        return replace(plan, peak_elements=peak_in_pieces(plan.peak_elements, batch, shape))
    top_k = check_positive_int("top_k", top_k)
    shared = {center_site} if shared_sites is None else shared_sites
    shared = resolve_shared_sites(shared, shape.sites, center_site)
    check_one_of("matrix", matrix, (*PROJECTIONS, None))
    check_one_of("route", route, (*ROUTES, None))
    workload = Workload(
        shape=shape,
        bond_dims=bonds,
        center_site=center_site,
        rows=batch,
        experts=check_positive_int("experts", experts),
        training=training,
        itemsize=itemsize,
        shared_sites=shared,
        once=once_per_token_sites(shape.sites, shared, matrix),
        tokens=batch / top_k,
    )
    return _plan_for_experts(workload, get_rates(device), cached, route)


@lru_cache(maxsize=4096)
def _plan_for_experts(
    workload: Workload, rates: Rates, cached: bool, given: Route | None
) -> ContractionPlan:
    """Choose the given route, or the one that the cost model expects to be the fastest."""
    rows_of_expert = max(1, round(workload.rows / workload.active_experts))
    chain = plan_for_chain(workload.shape, workload.bond_dims, rows_of_expert)
    cost = ChainCost(chain.flops, chain.peak_elements)
    seconds = predict_seconds(workload, rates, cost if chain.route == "chain" else None, cached)
    fastest = min(seconds, key=lambda name: seconds[name])
    route = fastest if given is None else given
    flops, peak = flops_and_peak(workload, route, cost)
    return ContractionPlan(route, flops, peak, chain.path if route == "per_expert" else (), seconds)


@lru_cache(maxsize=4096)
def plan_for_chain(shape: MPOShape, bonds: tuple[int, ...], batch: int) -> ContractionPlan:
    """Choose the way of fewest operations for one MPO, all vectors going through at once."""
    cores = chain_shapes(shape, bonds)
    applying, building = applying_path(cores, batch), building_path(cores)
    chain = ContractionPlan("chain", applying.flops(batch), applying.peak(batch), applying.path)
    flops = building.flops(0) + 2 * batch * shape.padded_out * shape.padded_in
    rebuilt = ContractionPlan("rebuilt", flops, building.peak(0), building.path)
    # The best path with vectors may itself build the matrix first. The tie then goes to the name
    # that says so.
    return min(rebuilt, chain, key=lambda plan: plan.flops)
