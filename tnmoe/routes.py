"""The ways from activations to outputs, and which of them a model of their cost prefers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from tnmoe.costs import Rates
from tnmoe.options import Route
from tnmoe.paths import Path
from tnmoe.shapes import MPOShape
from tnmoe.tables import format_table

# A batch of products with so many columns runs at the rate of one large product on a CPU; with
# fewer, the columns are moved among the rows first.
WIDE = 16

# Going through the cores in order permutes nothing but small states, which makes up for this many
# times the operations of the best order.
IN_ORDER = 1.5

# Times the launch of an operation that every site takes, at inference and in training, as measured:
# reshapes for the most part, and on the shared route operators that Python has to dispatch.
_CALLS = {"chain": (27, 90), "shared": (33, 210)}

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
    route : {"chain", "dense", "shared", "cached"}
        ``chain`` contracts the vectors with the cores of their matrix; ``dense`` builds the
        matrices first. For experts also: ``shared`` contracts the vectors with the cores from the
        right, with the central core those of all experts together; ``cached`` has the matrices.
    flops : int
        Floating-point operations (a multiply-add counts as two) of a forward pass.
    peak_elements : int
        Numbers in the largest intermediate array; of a piece, where vectors go through in pieces.
    path : tuple of tuple of int
        Pairwise contractions in opt_einsum's form: of (vectors, cores…) on the chain route, of
        (cores…) on the dense one; empty on the others.
    seconds : dict
        For experts: predicted seconds of every route that is open.

    Examples
    --------
    >>> from tnmoe import MPOShape, contraction_plan
    >>> plan = contraction_plan(MPOShape((4, 4, 4), (4, 4, 4)), (2, 2), batch=8)
    >>> plan.route, plan.path
    ('chain', ((0, 3), (1, 2), (0, 1)))
    """

    route: Route
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
class Work:
    """One layer's worth of vectors for experts that share a core.

    Attributes
    ----------
    shape, bond_dims, center : MPOShape, tuple of int, int
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
    center: int
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

    def split(self, dims: tuple[int, ...]) -> tuple[int, int, int]:
        """Legs left of the centre, of the centre, and right of it."""
        return prod(dims[: self.center]), dims[self.center], prod(dims[self.center + 1 :])


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


def in_order_width(shape: MPOShape, bonds: tuple[int, ...]) -> int:
    """Numbers in the largest state of a vector that goes through the cores from the right."""
    padded = (1, *bonds, 1)
    rest, outs, widest = shape.padded_in, 1, shape.padded_in
    for site in reversed(range(shape.sites)):
        rest //= shape.in_dims[site]
        outs *= shape.out_dims[site]
        widest = max(widest, rest * padded[site] * outs)
    return widest


def expert_routes(
    work: Work, rates: Rates, chain: ContractionPlan, cached: bool
) -> ContractionPlan:
    """The fastest route for experts, ``chain`` being the plan for one of them alone."""
    seconds: dict[Route, float] = {
        "shared": _shared_seconds(work, rates),
        "dense": _dense_seconds(work, rates),
    }
    if chain.route == "chain":
        seconds["chain"] = _chain_seconds(work, rates, chain)
    if cached and not work.training:
        seconds["cached"] = work.active * _product(work, rates, *_linear(work))
    route = min(seconds, key=lambda name: seconds[name])
    if route == "chain":
        vectors = max(1, round(work.rows / work.active))
        flops = round(work.active * chain.flops)
        peak = peak_in_pieces(chain.peak_elements, vectors, work.shape)
    else:
        flops, peak = _flops_and_peak(work, route)
    return ContractionPlan(route, flops, peak, chain.path if route == "chain" else (), seconds)


def _flops_and_peak(work: Work, route: str) -> tuple[int, int]:
    rows, depth, columns = _linear(work)
    if route == "shared":
        width = in_order_width(work.shape, work.bond_dims)
        peak = min(work.rows, rows_per_piece(width, work.ends)) * width
        return round(sum(2 * prod(step) for step in _steps(work))), round(peak)
    of_one = 2 * rows * depth * columns
    if route == "dense":
        of_one += sum(2 * prod(sizes) for sizes in _building(work))
    return round(work.active * of_one), depth * columns


def _product(work: Work, rates: Rates, rows: float, depth: float, columns: float) -> float:
    """A product, and in training those of both its gradients."""
    forward = rates.product(rows, depth, columns, work.itemsize)
    if not work.training:
        return forward
    of_rows = rates.product(rows, columns, depth, work.itemsize)
    return forward + of_rows + rates.product(depth, rows, columns, work.itemsize)


def _linear(work: Work) -> tuple[float, int, int]:
    """Sizes of one expert's product with its own matrix."""
    return work.rows / work.active, work.shape.padded_in, work.shape.padded_out


def _building(work: Work) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Sizes of the two products that build one expert's matrix."""
    (out_l, out_c, out_r), (in_l, in_c, in_r) = map(
        work.split, (work.shape.out_dims, work.shape.in_dims)
    )
    left, right = work.bonds[work.center : work.center + 2]
    return (
        (out_l * in_l, left, out_c * in_c * right),
        (out_l * in_l * out_c * in_c, right, out_r * in_r),
    )


def _dense_seconds(work: Work, rates: Rates) -> float:
    size = work.itemsize
    half, whole = _building(work)
    # The arrays that one expert after the other is built in are partly in a cache.
    warm = replace(rates, bandwidth=_WARM * rates.bandwidth)
    moved = warm.move(half[0] * half[2], size) + warm.move(whole[0] * whole[2], size)
    building = sum(_product(work, warm, *sizes) for sizes in (half, whole)) + moved
    if work.training:
        # Built once more for the backward, and the gradients moved back.
        again = sum(warm.product(*sizes, size) for sizes in (half, whole))
        building += again + 2 * moved
    return work.active * (building + _product(work, rates, *_linear(work)))


def _steps(work: Work) -> Iterator[tuple[float, int, int, int]]:
    """Rows, depth, columns of the core and of the state in every product on the shared route."""
    rest, outs = work.shape.padded_in, 1
    for site in reversed(range(work.shape.sites)):
        out, in_ = work.shape.out_dims[site], work.shape.in_dims[site]
        rest //= in_
        before, after = work.bonds[site], work.bonds[site + 1]
        yield work.rows * rest, in_ * after, out * before, outs
        outs *= out


def _shared_seconds(work: Work, rates: Rates) -> float:
    passes = 3 if work.training else 1
    total = _launches(work, rates, "shared")
    for position, (rows, depth, columns, outs) in enumerate(_steps(work)):
        if 1 < outs < WIDE:
            moved = rows * outs * (depth + columns)
            total += passes * rates.move(moved, work.itemsize)
        groups = 1.0 if work.shape.sites - 1 - position == work.center else work.active
        total += groups * _product(work, rates, rows * outs / groups, depth, columns)
    width = in_order_width(work.shape, work.bond_dims)
    if work.training and work.rows > rows_per_piece(width, work.ends):
        total += _shared_seconds(replace(work, training=False), rates)
    return total


def _chain_seconds(work: Work, rates: Rates, chain: ContractionPlan) -> float:
    """Of one expert after the other."""
    passes = 3 if work.training else 1
    steps = list(_steps(replace(work, rows=work.rows / work.active)))
    if sum(2 * prod(step) for step in steps) <= IN_ORDER * chain.flops:
        each = sum(
            _product(work, rates, rows * outs, depth, columns)
            + passes * rates.move(rows * outs * depth, work.itemsize)
            for rows, depth, columns, outs in steps
        )
    else:
        bonds = work.bonds[work.center : work.center + 2]
        center = prod(bonds) * work.shape.out_dims[work.center] * work.shape.in_dims[work.center]
        moving = _PERMUTED * rates.move(chain.peak_elements, work.itemsize)
        reading = center * work.itemsize / rates.bandwidth
        each = passes * (chain.flops / rates.flops + moving + reading)
    return work.active * (each + _launches(work, rates, "chain"))


def _launches(work: Work, rates: Rates, route: str) -> float:
    return _CALLS[route][work.training] * work.shape.sites * rates.launch
