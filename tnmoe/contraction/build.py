"""Dense matrices built from cores: of one chain, and of experts around a central core."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.contraction.paths import CoreShapes, building_path, shapes_of

# Legs of a segment are put in order while it has this many times fewer entries than the matrix.
_SMALL_SEGMENT = 8


def to_padded_matrix(xp: Backend, cores: Sequence[Array]) -> Array:
    """Multiply all cores of a chain to a (padded out, padded in) matrix."""
    segments = [(core, [core.shape[1:3]]) for core in cores]
    rows, columns = (prod(core.shape[axis] for core in cores) for axis in (1, 2))
    for site in _merge_order(shapes_of(cores)):
        (left, left_legs), (right, right_legs) = segments[site : site + 2]
        product = left.reshape(-1, left.shape[-1]) @ right.reshape(right.shape[0], -1)
        ends = (left.shape[0], right.shape[-1])
        merged = product.reshape(ends[0], -1, ends[1]), [*left_legs, *right_legs]
        # Permuting a small segment is cheap, and the last permutation, that of the whole matrix,
        # then moves larger pieces.
        if prod(product.shape) * _SMALL_SEGMENT <= rows * columns:
            merged = _outputs_first(xp, *merged)
        segments[site : site + 2] = [merged]
    return _outputs_first(xp, *segments[0])[0].reshape(rows, columns)


def _outputs_first(
    xp: Backend, segment: Array, legs: Sequence[tuple[int, int]]
) -> tuple[Array, list[tuple[int, int]]]:
    """Permute a segment (D, out · in · out · in …, D') to (D, out · out … · in · in …, D')."""
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
def _merge_order(cores: CoreShapes) -> tuple[int, ...]:
    """Return the best order of merges: which segment takes in its right neighbour next."""
    segments = [(site, site + 1) for site in range(len(cores))]
    merges, remaining = [], list(segments)
    for step in building_path(cores).path:
        merged = [remaining.pop(term) for term in sorted(step, reverse=True)]
        start, stop = min(merged)[0], max(merged)[1]
        remaining.append((start, stop))
        if len(merged) == 2:  # the path of a single core has one step, which changes nothing
            site = segments.index(min(merged))
            segments[site : site + 2] = [(start, stop)]
            merges.append(site)
    return tuple(merges)


def stacked_to_padded_matrices(
    xp: Backend, center: Array, left: Sequence[Array], right: Sequence[Array]
) -> Array:
    """Build the matrices of E experts from the central core and the stacked cores around it.

    A shared central core takes one product for all experts together, then a batched one.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    center : array, shape (D, out, in, D') or (E, D, out, in, D')
        Central core: one that all experts share, or one per expert.
    left, right : sequence of array, shapes (E, D, out, in, D')
        Stacked cores left and right of it, at least one in all.

    Returns
    -------
    array, shape (E, padded out, padded in)
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
    """Multiply the cores left of a site.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    cores : sequence of array, shapes (..., D, out, in, D')
        Neighbouring cores, left to right. Leading axes are a batch; they broadcast.

    Returns
    -------
    array of shape (..., out·in, D'), or None without cores
        Outputs before inputs. A first bond larger than 1 counts among the outputs.
    int, int
        Products of the output legs and of the input legs.
    """
    if not cores:
        return None, 1, 1
    *batch, first, out, in_, bond = cores[0].shape
    out *= first
    env = cores[0].reshape(*batch, out * in_, bond)
    for core in cores[1:]:
        *batch, _, o, i, following = core.shape
        env = env @ core.reshape(*batch, bond, o * i * following)
        env = _swap_axes(xp, env.reshape(*env.shape[:-2], out, in_, o, i, following), -4)
        out, in_, bond = out * o, in_ * i, following
        env = env.reshape(*env.shape[:-5], out * in_, bond)
    return env, out, in_


def right_environment(xp: Backend, cores: Sequence[Array]) -> tuple[Array | None, int, int]:
    """Multiply the cores right of a site; the mirror image of :func:`left_environment`.

    The array has shape (..., D, out·in). A last bond larger than 1 counts among the inputs.
    """
    if not cores:
        return None, 1, 1
    *batch, bond, out, in_, last = cores[-1].shape
    in_ *= last
    env = cores[-1].reshape(*batch, bond, out * in_)
    for core in reversed(cores[:-1]):
        *batch, preceding, o, i, _ = core.shape
        env = core.reshape(*batch, preceding * o * i, bond) @ env
        env = _swap_axes(xp, env.reshape(*env.shape[:-2], preceding, o, i, out, in_), -3)
        out, in_, bond = o * out, i * in_, preceding
        env = env.reshape(*env.shape[:-5], bond, out * in_)
    return env, out, in_


def _swap_axes(xp: Backend, array: Array, axis: int) -> Array:
    """Swap an axis, counted from the last, with the one after it."""
    axes = list(range(array.ndim))
    axes[axis], axes[axis + 1] = axes[axis + 1], axes[axis]
    return xp.permute(array, axes)


def as_numpy(xp: Backend, matrix: Array, dtype: Any, copy: bool | None) -> np.ndarray:
    """Return a matrix that was built for NumPy's ``__array__`` protocol."""
    if copy is False:
        raise ValueError("the cores of an operator are not a dense matrix: a copy is needed")
    # The matrix of a single site is a view of the core, which the owner of a copy may write into.
    return np.array(xp.to_numpy(matrix), dtype=dtype, copy=True if copy else None)
