"""Contracting chains of cores: the best order, a cost model, and the product for experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.contraction.einsum import Contraction, Shapes
from tnmoe.contraction.expert_routes import (
    CORE_BY_CORE,
    ContractionPlan,
    Workload,
    core_by_core_width,
    peak_in_pieces,
    plan_for_experts,
    rows_per_piece,
)
from tnmoe.contraction.paths import CoreShapes, Network, applying_path, building_path
from tnmoe.contraction.rates import Rates, get_rates
from tnmoe.errors import InputError, index_in, integer_from_zero, positive_int
from tnmoe.shapes import MPOShape

# A segment of a chain with this many times fewer numbers than the matrix is small.
_SMALL_SEGMENT = 8

# What no library can count the entries of an axis to.
_TOO_LARGE = 2**63


def contraction_plan(
    shape: MPOShape,
    bond_dims: tuple[int, ...] | None = None,
    batch: int = 1,
    *,
    experts: int | None = None,
    center_site: int | None = None,
    training: bool = False,
    cached: bool = False,
    device: str = "cpu",
    itemsize: int = 4,
) -> ContractionPlan:
    """Cheapest way to apply an MPO, or experts that share its centre, to ``batch`` vectors.

    For one MPO that is the way of fewest operations. For experts it is the one that a model of
    operations, bytes and launches expects to be fastest on a device.

    Parameters
    ----------
    shape : MPOShape
        Legs of the MPO.
    bond_dims : tuple of int, optional
        Inner bond dimensions, also larger than a matrix needs; exact ones by default.
    batch : int
        Number of vectors; of all experts together.
    experts : int, optional
        Number of experts that share the central core; without it the plan is for one MPO.
    center_site : int, optional
        Site that they share; ``shape.center_site`` by default.
    training : bool
        Whether gradients will be asked for.
    cached : bool
        Whether the experts' matrices are at hand, or may be kept once they are built.
    device : str
        Kind of device, ``"cpu"`` or ``"cuda"``; one without rates of its own is taken for the
        latter.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    ContractionPlan
        For up to 8 sites its path is the best among pairwise contractions without outer products
        (opt_einsum's dynamic programming; Pfeifer, Haegeman, Verstraete, Phys. Rev. E 90, 033315
        (2014)) at batches of powers of two, and the cheaper of its neighbours' between them. For
        more sites it is the best of those in which what has been contracted is always a run of
        neighbours, or all but a run; from 33 sites on, neighbours whose product is no larger than
        they are come first.

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
        positive_int("every bond dimension", bond)
    batch = integer_from_zero("batch", batch)
    itemsize = positive_int("itemsize", itemsize)
    if max(shape.padded_out, shape.padded_in, batch, *bonds) >= _TOO_LARGE:
        raise InputError("a plan is for a matrix, bonds and a batch of less than 2**63 each")
    center_site = (
        shape.center_site
        if center_site is None
        else index_in("center_site", center_site, shape.sites)
    )
    if experts is None:
        plan = _plan_of_one(shape, bonds, batch)
        return replace(plan, peak_elements=peak_in_pieces(plan.peak_elements, batch, shape))
    rates = get_rates(device)
    return _plan_of_experts(
        shape, bonds, center_site, batch, experts, training, itemsize, cached, rates
    )


@lru_cache(maxsize=4096)
def _plan_of_experts(
    shape: MPOShape,
    bonds: tuple[int, ...],
    center_site: int,
    batch: int,
    experts: int,
    training: bool,
    itemsize: int,
    cached: bool,
    rates: Rates,
) -> ContractionPlan:
    positive_int("experts", experts)
    workload = Workload(shape, bonds, center_site, batch, experts, training, itemsize)
    chain = _plan_of_one(shape, bonds, max(1, round(batch / workload.active)))
    return plan_for_experts(workload, rates, chain, cached)


@lru_cache(maxsize=4096)
def _plan_of_one(shape: MPOShape, bonds: tuple[int, ...], batch: int) -> ContractionPlan:
    padded = (1, *bonds, 1)
    cores = tuple(zip(padded[:-1], shape.out_dims, shape.in_dims, padded[1:], strict=True))
    best, build = applying_path(cores, batch), building_path(cores)
    direct = ContractionPlan("chain", best.flops(batch), best.peak(batch), best.path)
    flops = build.flops(0) + 2 * batch * shape.padded_out * shape.padded_in
    dense = ContractionPlan("rebuilt", flops, build.peak(0), build.path)
    # The best chain path may itself build the matrix first; then it is called what it is.
    return min(dense, direct, key=lambda plan: plan.flops)


def to_padded_matrix(xp: Backend, cores: Sequence[Array]) -> Array:
    """Product of all cores as a (padded out, padded in) matrix."""
    segments = [(core, [core.shape[1:3]]) for core in cores]
    rows, columns = (prod(core.shape[axis] for core in cores) for axis in (1, 2))
    for site in _merges(_shapes(cores)):
        (left, left_legs), (right, right_legs) = segments[site : site + 2]
        product = left.reshape(-1, left.shape[-1]) @ right.reshape(right.shape[0], -1)
        ends = (left.shape[0], right.shape[-1])
        merged = product.reshape(ends[0], -1, ends[1]), [*left_legs, *right_legs]
        # Putting legs in order is cheap as long as a segment is small, and makes the last
        # permutation, the one of the whole matrix, move larger pieces.
        if prod(product.shape) * _SMALL_SEGMENT <= rows * columns:
            merged = _gather_legs(xp, *merged)
        segments[site : site + 2] = [merged]
    return _gather_legs(xp, *segments[0])[0].reshape(rows, columns)


def _gather_legs(
    xp: Backend, segment: Array, legs: Sequence[tuple[int, int]]
) -> tuple[Array, list[tuple[int, int]]]:
    """A segment (D, out · in · out · in …, D') with its outputs before its inputs."""
    left, right = segment.shape[0], segment.shape[-1]
    # Legs of size 1 are left out: libraries limit the number of axes.
    sizes = [size for leg in legs for size in leg if size > 1]
    sides = [side for leg in legs for side, size in enumerate(leg) if size > 1]
    axes = sorted(range(len(sizes)), key=sides.__getitem__)
    ordered = xp.permute(
        segment.reshape(left, *sizes, right), [0, *(1 + axis for axis in axes), 1 + len(sizes)]
    )
    out, in_ = (prod(leg[axis] for leg in legs) for axis in (0, 1))
    return ordered.reshape(left, out * in_, right), [(out, in_)]


@lru_cache(maxsize=4096)
def _merges(cores: CoreShapes) -> tuple[int, ...]:
    """The best order to merge a chain in: which segment is merged with its right neighbour."""
    segments = [(site, site + 1) for site in range(len(cores))]
    merges, remaining = [], list(segments)
    for step in building_path(cores).path:
        merged = [remaining.pop(term) for term in sorted(step, reverse=True)]
        start, stop = min(merged)[0], max(merged)[1]
        remaining.append((start, stop))
        if len(merged) == 2:  # a lone core has a path of one step that leaves it alone
            site = segments.index(min(merged))
            segments[site : site + 2] = [(start, stop)]
            merges.append(site)
    return tuple(merges)


def apply_cores(xp: Backend, shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply a chain of cores to vectors (batch, padded in) → (batch, padded out).

    In pieces of the batch, where a state would have more numbers than ``routes.STATE_LIMIT``.
    """
    batch, bonds = vectors.shape[0], tuple(core.shape[0] for core in cores[1:])
    step = rows_per_piece(state_width(shape, bonds, batch), max(shape.padded_in, shape.padded_out))
    if batch <= step:
        return _apply_at_once(xp, shape, cores, vectors)
    starts = range(0, batch, step)
    pieces = [_apply_at_once(xp, shape, cores, vectors[at : at + step]) for at in starts]
    return xp.concatenate(pieces, 0)


@lru_cache(maxsize=4096)
def state_width(shape: MPOShape, bonds: tuple[int, ...], batch: int) -> float:
    """Numbers that the largest state of :func:`apply_cores` has for a vector."""
    plan = _plan_of_one(shape, bonds, batch)
    padded = (1, *bonds, 1)
    cores = tuple(zip(padded[:-1], shape.out_dims, shape.in_dims, padded[1:], strict=True))
    if plan.route == "chain" and _core_by_core_flops(cores, batch) <= CORE_BY_CORE * plan.flops:
        return core_by_core_width(shape, bonds)
    # Products of cores alone are no larger than the matrix.
    of_vectors = plan.peak_elements > shape.padded_out * shape.padded_in
    return plan.peak_elements / batch if plan.route == "chain" and of_vectors else 0


def _apply_at_once(xp: Backend, shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    batch = vectors.shape[0]
    plan = _plan_of_one(shape, tuple(core.shape[0] for core in cores[1:]), batch)
    if plan.route == "rebuilt":
        return vectors @ xp.transpose(to_padded_matrix(xp, cores))
    if _core_by_core_flops(_shapes(cores), batch) <= CORE_BY_CORE * plan.flops:
        return _apply_core_by_core(xp, cores, vectors)
    contraction, shapes = _contraction(_shapes(cores), batch)
    operands = [array.reshape(size) for array, size in zip([vectors, *cores], shapes, strict=True)]
    return contraction(xp, operands).reshape(batch, shape.padded_out)


@lru_cache(maxsize=4096)
def _contraction(cores: CoreShapes, batch: int) -> tuple[Contraction, Shapes]:
    """Contraction of cores with vectors, and the shapes that it takes them in."""
    network = Network.of(cores, has_vectors=True).without_units()
    shapes = network.shapes(batch)
    return Contraction(network.equation(), shapes, applying_path(cores, batch).path), shapes


def _apply_core_by_core(xp: Backend, cores: Sequence[Array], vectors: Array) -> Array:
    """Contract vectors (batch, padded in) with one core after the other, right to left.

    A core is the matrix (left bond · output, input · right bond) as it lies. The state has axes
    (bond, last output, inputs to come, outputs before), batch among the inputs, so that every
    step is one large product and one copy of the state, which is much smaller than the cores.
    """
    batch, rest = vectors.shape
    rest *= batch
    state, last, outs = vectors.reshape(1, 1, rest, 1), 1, 1
    for core in reversed(cores):
        bond, out, in_, following = core.shape
        rest //= in_
        # (bond, last, rest, in, outs) -> (in · bond, rest · last · outs)
        columns = xp.permute(state.reshape(following, last, rest, in_, outs), (3, 0, 2, 1, 4))
        columns = columns.reshape(in_ * following, rest * last * outs)
        outs *= last
        state, last = core.reshape(bond * out, in_ * following) @ columns, out
    return xp.permute(state.reshape(last, batch, outs), (1, 0, 2)).reshape(batch, last * outs)


@lru_cache(maxsize=4096)
def _core_by_core_flops(cores: CoreShapes, batch: int) -> int:
    """Operations of :func:`_apply_core_by_core`."""
    states, outs, flops = batch * prod(core[2] for core in cores), 1, 0
    for bond, out, in_, following in reversed(cores):
        states //= in_
        flops += 2 * states * bond * out * in_ * following * outs
        outs *= out
    return flops


def stacked_to_padded_matrices(
    xp: Backend, center: Array, left: Sequence[Array], right: Sequence[Array]
) -> Array:
    """Matrices of E experts, from the central core and the stacked cores around it.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    center : array, shape (D, out, in, D') or (E, D, out, in, D')
        Central core: one that all share, or every expert's own.
    left, right : sequence of array, shapes (E, D, out, in, D')
        Stacked cores left and right of it, at least one in all.

    Returns
    -------
    array, shape (E, padded out, padded in)
        A shared central core takes one product for all experts together, then a batched one.
    """
    experts = (*left, *right)[0].shape[0]
    *own, bond_l, out_c, in_c, bond_r = center.shape
    env_l, out_l, in_l = left_environment(xp, left)
    env_r, out_r, in_r = right_environment(xp, right)
    # A side without auxiliary cores has the environment 1, the same for all experts.
    product = center.reshape(*(own or [1]), -1, bond_r)
    if env_l is not None:
        rows = env_l if own else env_l.reshape(-1, bond_l)
        product = rows @ center.reshape(*own, bond_l, -1)
        product = product.reshape(experts, -1, bond_r)
    if env_r is not None:
        product = product @ env_r
    # (E, Ol, Il, Oc, Ic, Or, Ir) -> (E, Ol, Oc, Or, Il, Ic, Ir)
    legs = product.reshape(experts, out_l, in_l, out_c, in_c, out_r, in_r)
    return xp.permute(legs, (0, 1, 3, 5, 2, 4, 6)).reshape(
        experts, out_l * out_c * out_r, in_l * in_c * in_r
    )


def left_environment(xp: Backend, cores: Sequence[Array]) -> tuple[Array | None, int, int]:
    """Product of stacked cores left of the centre, (E, out·in, D), and its legs."""
    if not cores:
        return None, 1, 1
    experts, _, out, in_, bond = cores[0].shape
    env = cores[0].reshape(experts, out * in_, bond)
    for core in cores[1:]:
        _, _, o, i, following = core.shape
        env = env @ core.reshape(experts, bond, o * i * following)
        env = xp.permute(env.reshape(experts, out, in_, o, i, following), (0, 1, 3, 2, 4, 5))
        out, in_, bond = out * o, in_ * i, following
        env = env.reshape(experts, out * in_, bond)
    return env, out, in_


def right_environment(xp: Backend, cores: Sequence[Array]) -> tuple[Array | None, int, int]:
    """Product of stacked cores right of the centre, (E, D, out·in), and its legs."""
    if not cores:
        return None, 1, 1
    experts, bond, out, in_, _ = cores[-1].shape
    env = cores[-1].reshape(experts, bond, out * in_)
    for core in reversed(cores[:-1]):
        _, preceding, o, i, _ = core.shape
        env = core.reshape(experts, preceding * o * i, bond) @ env
        env = xp.permute(env.reshape(experts, preceding, o, i, out, in_), (0, 1, 2, 4, 3, 5))
        out, in_, bond = o * out, i * in_, preceding
        env = env.reshape(experts, bond, out * in_)
    return env, out, in_


def _shapes(cores: Sequence[Array]) -> CoreShapes:
    return tuple(tuple(core.shape) for core in cores)
