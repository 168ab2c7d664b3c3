"""Cost model of the routes that experts' vectors may take."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from math import prod

from tnmoe.contraction.core_by_core import (
    Step,
    core_by_core_steps,
    core_by_core_width,
    is_core_by_core_faster,
)
from tnmoe.contraction.paths import CoreShapes
from tnmoe.contraction.pieces import peak_in_pieces, rows_per_piece
from tnmoe.contraction.rates import Rates
from tnmoe.options import ProjectionName, Route
from tnmoe.shapes import MPOShape, chain_shapes

# From this number of columns on, a CPU runs a batch of products at the rate of one large product.
# Fewer columns are moved among the rows first.
WIDE = 16

# Measured launches per site, as multiples of an operation's launch: at inference and in training.
# Most are reshapes; on the route ``joint`` they are operators that Python dispatches.
_LAUNCHES = {"per_expert": (27, 90), "joint": (33, 210)}

# Bandwidth of a CPU for arrays that are still in its caches, as a multiple of that of its memory.
_CACHE_BANDWIDTH = 2.0

# How often a contraction that permutes freely moves its largest intermediate.
_MOVES_OF_PEAK = 1.85

# Products in training for one of a forward pass: that one, and one for the gradient of each factor.
_TRAINING_PASSES = 3


@dataclass(frozen=True)
class Workload:
    """One layer's vectors for experts that share a core.

    Attributes
    ----------
    shape, bond_dims, center_site : MPOShape, tuple of int, int
        The matrices, and the site of their central core.
    rows, experts : float, int
        Vectors in all, and the experts that they may go to.
    shared_sites : frozenset of int
        Sites whose cores the experts share.
    once : frozenset of int
        Sites that act once per token on the route ``joint``; see :func:`once_per_token_sites`.
    tokens : float
        Vectors that these sites act on.
    training : bool
        Whether a backward pass will follow.
    itemsize : int
        Bytes of a number.
    """

    shape: MPOShape
    bond_dims: tuple[int, ...]
    center_site: int
    rows: float
    experts: int
    training: bool
    itemsize: int
    shared_sites: frozenset[int]
    once: frozenset[int]
    tokens: float

    @property
    def active_experts(self) -> float:
        """Expected number of experts with rows, at least 1, if all are equally likely."""
        return max(1.0, self.experts * (1 - (1 - 1 / self.experts) ** self.rows))

    @property
    def rows_per_expert(self) -> float:
        """Rows of an expert that gets any."""
        return self.rows / self.active_experts

    def joint_steps(self) -> Iterator[tuple[int, Step]]:
        """Yield every site with its step of the route ``joint``, from the last site to the first.

        The rows of a step count tokens where a site acts once per token, and slots elsewhere.
        """
        sites = reversed(range(self.shape.sites))
        for site, step in zip(sites, core_by_core_steps(self.cores, 1), strict=True):
            vectors = self.tokens if site in self.once else self.rows
            yield site, step._replace(rows=vectors * step.rows)

    @property
    def row_size(self) -> int:
        """Entries of a vector or of its result, whichever has more."""
        return max(self.shape.padded_in, self.shape.padded_out)

    @property
    def cores(self) -> CoreShapes:
        """Shapes (D, out, in, D') of one expert's cores."""
        return chain_shapes(self.shape, self.bond_dims)

    @property
    def passes(self) -> int:
        """Number of times that each array of a forward pass is moved, backward pass included."""
        return _TRAINING_PASSES if self.training else 1

    @property
    def is_in_pieces(self) -> bool:
        """Whether the rows go through the cores in pieces on the route ``joint``."""
        width = core_by_core_width(self.shape, self.bond_dims)
        return self.rows > rows_per_piece(width, self.row_size)


@dataclass(frozen=True)
class ChainCost:
    """Cost of taking the rows of one expert through its chain of cores.

    Attributes
    ----------
    flops, peak_elements : int
        Operations, and entries of the largest intermediate array.
    """

    flops: int
    peak_elements: int


def once_per_token_sites(
    sites: int, shared_sites: Set[int], matrix: ProjectionName | None
) -> frozenset[int]:
    """Return the sites that act once per token, however many experts the token visits.

    Cores act from the right. In all but ``down``, shared sites at the right end act before
    tokens are dispatched to slots. In ``down``, shared sites at the left end act after slots are
    combined.

    Parameters
    ----------
    sites : int
        Number of sites.
    shared_sites : set of int
        Sites whose cores all experts share; not all sites.
    matrix : {"gate_up", "gate", "up", "down"}, optional
        The place of the matrix in a layer; None for a matrix alone, whose vectors are slots.
    """
    owned = set(range(sites)) - shared_sites
    if matrix is None:
        return frozenset()
    return frozenset(range(min(owned)) if matrix == "down" else range(max(owned) + 1, sites))


def predict_seconds(
    workload: Workload, rates: Rates, chain: ChainCost | None, cached: bool
) -> dict[Route, float]:
    """Predict the seconds of every possible route.

    Parameters
    ----------
    workload : Workload
    rates : Rates
        Of the device.
    chain : ChainCost or None
        Cost of one expert's chain; None where its best path builds the matrix anyway.
    cached : bool
        Whether the matrices are in memory.
    """
    seconds: dict[Route, float] = {
        "joint": _joint_seconds(workload, rates),
        "rebuilt": _rebuilt_seconds(workload, rates),
    }
    if chain is not None:
        seconds["per_expert"] = _per_expert_seconds(workload, rates, chain)
    if cached and not workload.training:
        product = _product_seconds(workload, rates, *_own_product(workload))
        seconds["cached"] = workload.active_experts * product
    return seconds


def flops_and_peak(workload: Workload, route: Route, chain: ChainCost) -> tuple[int, int]:
    """Count the operations of a route and the entries of its largest intermediate array."""
    if route == "per_expert":
        vectors = max(1, round(workload.rows_per_expert))
        peak = peak_in_pieces(chain.peak_elements, vectors, workload.shape)
        return round(workload.active_experts * chain.flops), peak
    rows, depth, columns = _own_product(workload)
    if route == "joint":
        width = core_by_core_width(workload.shape, workload.bond_dims)
        largest_state = min(workload.rows, rows_per_piece(width, workload.row_size)) * width
        steps = (step for _, step in workload.joint_steps())
        return round(sum(2 * prod(step) for step in steps)), round(largest_state)
    flops_per_expert: float = 2 * rows * depth * columns
    if route == "rebuilt":
        flops_per_expert += sum(2 * prod(sizes) for sizes in _building_products(workload))
    return round(workload.active_experts * flops_per_expert), depth * columns


def _product_seconds(
    workload: Workload, rates: Rates, rows: float, depth: float, columns: float
) -> float:
    """Predict a product, and in training the products for both its gradients."""
    forward = rates.product(rows, depth, columns, workload.itemsize)
    if not workload.training:
        return forward
    rows_gradient = rates.product(rows, columns, depth, workload.itemsize)
    return forward + rows_gradient + rates.product(depth, rows, columns, workload.itemsize)


def _own_product(workload: Workload) -> tuple[float, int, int]:
    """Return rows, depth and columns of one expert's product with its own matrix."""
    return workload.rows_per_expert, workload.shape.padded_in, workload.shape.padded_out


def _building_products(workload: Workload) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return rows, depth and columns of the two products that build one expert's matrix."""
    (out_l, out_c, out_r), (in_l, in_c, in_r) = workload.shape.legs_around(workload.center_site)
    left, *_, right = workload.cores[workload.center_site]
    return (
        (out_l * in_l, left, out_c * in_c * right),
        (out_l * in_l * out_c * in_c, right, out_r * in_r),
    )


def _rebuilt_seconds(workload: Workload, rates: Rates) -> float:
    size = workload.itemsize
    half, whole = _building_products(workload)
    # The same arrays serve one expert after the other, so parts of them stay in a cache.
    warm = replace(rates, bandwidth=_CACHE_BANDWIDTH * rates.bandwidth)
    moved = warm.move(half[0] * half[2], size) + warm.move(whole[0] * whole[2], size)
    building = sum(_product_seconds(workload, warm, *sizes) for sizes in (half, whole)) + moved
    if workload.training:
        # The backward pass builds the matrix again and moves the gradients back.
        again = sum(warm.product(*sizes, size) for sizes in (half, whole))
        building += again + 2 * moved
    product = _product_seconds(workload, rates, *_own_product(workload))
    return workload.active_experts * (building + product)


def _joint_seconds(workload: Workload, rates: Rates) -> float:
    total = _launch_seconds(workload, rates, "joint")
    for site, (rows, depth, columns, outs) in workload.joint_steps():
        if 1 < outs < WIDE:
            moved = rows * outs * (depth + columns)
            total += workload.passes * rates.move(moved, workload.itemsize)
        groups = 1.0 if site in workload.shared_sites else workload.active_experts
        total += groups * _product_seconds(workload, rates, rows * outs / groups, depth, columns)
    if workload.training and workload.is_in_pieces:
        # The backward pass takes each piece through the cores again.
        total += _joint_seconds(replace(workload, training=False), rates)
    return total


def _per_expert_seconds(workload: Workload, rates: Rates, chain: ChainCost) -> float:
    rows = workload.rows_per_expert
    if is_core_by_core_faster(workload.cores, rows, chain.flops):
        steps = core_by_core_steps(workload.cores, rows)
        expert = sum(_step_seconds(workload, rates, step) for step in steps)
    else:
        center = prod(workload.cores[workload.center_site])
        moving = _MOVES_OF_PEAK * rates.move(chain.peak_elements, workload.itemsize)
        reading = center * workload.itemsize / rates.bandwidth
        expert = workload.passes * (chain.flops / rates.flops + moving + reading)
    return workload.active_experts * (expert + _launch_seconds(workload, rates, "per_expert"))


def _step_seconds(workload: Workload, rates: Rates, step: Step) -> float:
    """Predict the product with one core, and the permutation of the state before it."""
    rows = step.rows * step.outs
    product = _product_seconds(workload, rates, rows, step.depth, step.columns)
    return product + workload.passes * rates.move(rows * step.depth, workload.itemsize)


def _launch_seconds(workload: Workload, rates: Rates, route: str) -> float:
    return _LAUNCHES[route][workload.training] * workload.shape.sites * rates.launch
