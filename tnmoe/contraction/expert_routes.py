"""The ways from activations to outputs, and which of them a model of their cost prefers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from tnmoe.contraction.paths import Path
from tnmoe.contraction.rates import Rates
from tnmoe.options import OperatorRoute, Route
from tnmoe.shapes import MPOShape
from tnmoe.system.tables import format_table

# A batch of products with so many columns runs at the rate of one large product on a CPU; with
# fewer, the columns are moved among the rows first.
WIDE = 16

# Going through the cores in order permutes nothing but small states, which makes up for this many
# times the operations of the best order.
CORE_BY_CORE = 1.5

# Times the launch of an operation that every site takes, at inference and in training, as measured:
# reshapes for the most part, and on the route ``joint`` operators that Python has to dispatch.
_CALLS = {"per_expert": (27, 90), "joint": (33, 210)}

# Times the bandwidth of memory that a CPU has for arrays that are still in its caches.
_WARM = 2.0

# How often a contraction that permutes as it likes moves its largest intermediate.
_PERMUTED = 1.85

# Numbers that a state between two cores may have. More rows than that go through in pieces, and in
# training a piece is computed again for the backward. 512 MiB in single precision.
STATE_LIMIT = 1 << 27


@dataclass(frozen=True)
class ContractionPlan:
    """How to apply an MPO, or the experts that share a core, to vectors, and what it costs.

    Attributes
    ----------
    route : {"chain", "rebuilt"}, or for experts {"joint", "per_expert", "rebuilt", "cached"}
        ``chain`` contracts the vectors with the cores; ``rebuilt`` builds the matrix first.
        ``joint`` takes the vectors of all experts together through the cores, from the right;
        ``per_expert`` takes each expert's own vectors through its cores; ``cached`` has the
        matrices.
    flops : int
        Floating-point operations (a multiply-add counts as two) of a forward pass.
    peak_elements : int
        Numbers in the largest intermediate array; of a piece, where vectors go through in pieces.
    path : tuple of tuple of int
        Pairwise contractions in opt_einsum's form: of (vectors, cores…) on the routes ``chain`` and
        ``per_expert``, of (cores…) on ``rebuilt`` for one MPO; empty on the others.
    seconds : dict
        For experts: predicted seconds of every route that is open.

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


@dataclass(frozen=True)
class Workload:
    """One layer's worth of vectors for experts that share a core.

    Attributes
    ----------
    shape, bond_dims, center_site : MPOShape, tuple of int, int
        The matrices, and the site that is shared.
    rows, experts : int
        Vectors in all, and experts they may go to.
    training : bool
        Whether gradients will be asked for.
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

    @property
    def active(self) -> float:
        """Experts that get any rows, if all are equally likely; at least one."""
        return max(1.0, self.experts * (1 - (1 - 1 / self.experts) ** self.rows))

    @property
    def ends(self) -> int:
        """Numbers in a vector, or in its result if that is larger."""
        return max(self.shape.padded_in, self.shape.padded_out)

    @property
    def bonds(self) -> tuple[int, ...]:
        return (1, *self.bond_dims, 1)


def rows_per_piece(width: float, ends: int) -> int:
    """Rows that go through together: all, unless what lies in between is larger than they are.

    Parameters
    ----------
    width : float
        Numbers that the largest state has for a row.
    ends : int
        Numbers that a row itself has, or its result if that is larger.
    """
    return sys.maxsize if width <= ends else max(1, int(STATE_LIMIT // width))


def peak_in_pieces(peak: int, batch: int, shape: MPOShape) -> int:
    """Numbers in the largest intermediate for ``batch`` vectors, which was ``peak`` at once."""
    # Products of cores alone, which no piece makes smaller, are no larger than the matrix.
    if batch == 0 or peak <= shape.padded_out * shape.padded_in:
        return peak
    step = rows_per_piece(peak / batch, max(shape.padded_in, shape.padded_out))
    return min(peak, round(step * peak / batch))


def core_by_core_width(shape: MPOShape, bonds: tuple[int, ...]) -> int:
    """Numbers in the largest state of a vector that goes through the cores from the right."""
    padded = (1, *bonds, 1)
    rest, outs, widest = shape.padded_in, 1, shape.padded_in
    for site in reversed(range(shape.sites)):
        rest //= shape.in_dims[site]
        outs *= shape.out_dims[site]
        widest = max(widest, rest * padded[site] * outs)
    return widest


def plan_for_experts(
    workload: Workload, rates: Rates, chain: ContractionPlan, cached: bool
) -> ContractionPlan:
    """The fastest route for experts, ``chain`` being the plan for one of them alone."""
    seconds: dict[Route, float] = {
        "joint": _joint_seconds(workload, rates),
        "rebuilt": _rebuilt_seconds(workload, rates),
    }
    if chain.route == "chain":
        seconds["per_expert"] = _per_expert_seconds(workload, rates, chain)
    if cached and not workload.training:
        seconds["cached"] = workload.active * _product(workload, rates, *_linear(workload))
    route = min(seconds, key=lambda name: seconds[name])
    if route == "per_expert":
        vectors = max(1, round(workload.rows / workload.active))
        flops = round(workload.active * chain.flops)
        peak = peak_in_pieces(chain.peak_elements, vectors, workload.shape)
    else:
        flops, peak = _flops_and_peak(workload, route)
    return ContractionPlan(route, flops, peak, chain.path if route == "per_expert" else (), seconds)


def _flops_and_peak(workload: Workload, route: str) -> tuple[int, int]:
    rows, depth, columns = _linear(workload)
    if route == "joint":
        width = core_by_core_width(workload.shape, workload.bond_dims)
        peak = min(workload.rows, rows_per_piece(width, workload.ends)) * width
        return round(sum(2 * prod(step) for step in _steps(workload))), round(peak)
    of_one = 2 * rows * depth * columns
    if route == "rebuilt":
        of_one += sum(2 * prod(sizes) for sizes in _building(workload))
    return round(workload.active * of_one), depth * columns


def _product(workload: Workload, rates: Rates, rows: float, depth: float, columns: float) -> float:
    """A product, and in training those of both its gradients."""
    forward = rates.product(rows, depth, columns, workload.itemsize)
    if not workload.training:
        return forward
    of_rows = rates.product(rows, columns, depth, workload.itemsize)
    return forward + of_rows + rates.product(depth, rows, columns, workload.itemsize)


def _linear(workload: Workload) -> tuple[float, int, int]:
    """Sizes of one expert's product with its own matrix."""
    return workload.rows / workload.active, workload.shape.padded_in, workload.shape.padded_out


def _building(workload: Workload) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Sizes of the two products that build one expert's matrix."""
    (out_l, out_c, out_r), (in_l, in_c, in_r) = workload.shape.legs_around(workload.center_site)
    left, right = workload.bonds[workload.center_site : workload.center_site + 2]
    return (
        (out_l * in_l, left, out_c * in_c * right),
        (out_l * in_l * out_c * in_c, right, out_r * in_r),
    )


def _rebuilt_seconds(workload: Workload, rates: Rates) -> float:
    size = workload.itemsize
    half, whole = _building(workload)
    # The arrays that one expert after the other is built in are partly in a cache.
    warm = replace(rates, bandwidth=_WARM * rates.bandwidth)
    moved = warm.move(half[0] * half[2], size) + warm.move(whole[0] * whole[2], size)
    building = sum(_product(workload, warm, *sizes) for sizes in (half, whole)) + moved
    if workload.training:
        # Built once more for the backward, and the gradients moved back.
        again = sum(warm.product(*sizes, size) for sizes in (half, whole))
        building += again + 2 * moved
    return workload.active * (building + _product(workload, rates, *_linear(workload)))


def _steps(workload: Workload) -> Iterator[tuple[float, int, int, int]]:
    """Rows, depth, columns of the core and of the state in every product on the route ``joint``."""
    rest, outs = workload.shape.padded_in, 1
    for site in reversed(range(workload.shape.sites)):
        out, in_ = workload.shape.out_dims[site], workload.shape.in_dims[site]
        rest //= in_
        before, after = workload.bonds[site], workload.bonds[site + 1]
        yield workload.rows * rest, in_ * after, out * before, outs
        outs *= out


def _joint_seconds(workload: Workload, rates: Rates) -> float:
    passes = 3 if workload.training else 1
    total = _launches(workload, rates, "joint")
    for position, (rows, depth, columns, outs) in enumerate(_steps(workload)):
        if 1 < outs < WIDE:
            moved = rows * outs * (depth + columns)
            total += passes * rates.move(moved, workload.itemsize)
        groups = (
            1.0 if workload.shape.sites - 1 - position == workload.center_site else workload.active
        )
        total += groups * _product(workload, rates, rows * outs / groups, depth, columns)
    width = core_by_core_width(workload.shape, workload.bond_dims)
    if workload.training and workload.rows > rows_per_piece(width, workload.ends):
        total += _joint_seconds(replace(workload, training=False), rates)
    return total


def _per_expert_seconds(workload: Workload, rates: Rates, chain: ContractionPlan) -> float:
    """Of one expert after the other."""
    passes = 3 if workload.training else 1
    steps = list(_steps(replace(workload, rows=workload.rows / workload.active)))
    if sum(2 * prod(step) for step in steps) <= CORE_BY_CORE * chain.flops:
        each = sum(
            _product(workload, rates, rows * outs, depth, columns)
            + passes * rates.move(rows * outs * depth, workload.itemsize)
            for rows, depth, columns, outs in steps
        )
    else:
        site = workload.center_site
        legs = workload.shape.out_dims[site] * workload.shape.in_dims[site]
        center = prod(workload.bonds[site : site + 2]) * legs
        moving = _PERMUTED * rates.move(chain.peak_elements, workload.itemsize)
        reading = center * workload.itemsize / rates.bandwidth
        each = passes * (chain.flops / rates.flops + moving + reading)
    return workload.active * (each + _launches(workload, rates, "per_expert"))


def _launches(workload: Workload, rates: Rates, route: str) -> float:
    return _CALLS[route][workload.training] * workload.shape.sites * rates.launch
