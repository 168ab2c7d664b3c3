"""Dense matrices built from cores: of one chain, and of experts that share some cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.contraction.paths import CoreShapes, neighbours_path, shapes_of

# Legs of a segment are put in order while it has this many times fewer entries than all matrices.
_SMALL_SEGMENT = 8


def to_padded_matrix(xp: Backend, cores: Sequence[Array]) -> Array:
    """Multiply all cores of a chain, or of the chains of experts that share some cores.

    The products of shared cores are computed once for all experts.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    cores : sequence of array, shapes (D, out, in, D') or (E, D, out, in, D')
        Cores of all sites, left to right; those with an axis of experts are owned.

    Returns
    -------
    array, shape (padded out, padded in), or (E, padded out, padded in) if a core is owned
    """
    segments = [_segment_of(core) for core in cores]
    rows, columns = (prod(core.shape[axis] for core in cores) for axis in (-3, -2))
    entries = rows * columns * max(prod(core.shape[:-4]) for core in cores)
    for site in _merge_order(shapes_of(cores)):
        (left, left_legs), (right, right_legs) = segments[site : site + 2]
        merged = _multiply(left, right), [*left_legs, *right_legs]
        # Permuting a small segment is cheap, and the last permutation, that of whole matrices, then
        # moves larger pieces.
        if prod(merged[0].shape) * _SMALL_SEGMENT <= entries:
            merged = _outputs_first(xp, *merged)
        segments[site : site + 2] = [merged]
    matrix = _outputs_first(xp, *segments[0])[0]
    return matrix.reshape(*matrix.shape[:-3], rows, columns)


def _segment_of(core: Array) -> tuple[Array, list[tuple[int, int]]]:
    """Return a core as a segment, (..., D, out · in, D'), and its legs."""
    *owners, left, out, in_, right = core.shape
    return core.reshape(*owners, left, out * in_, right), [(out, in_)]


def _multiply(left: Array, right: Array) -> Array:
    """Multiply neighbouring segments (..., D, legs, D'); an axis of experts stays in front."""
    *owners_left, first, _, bond = left.shape
    *owners_right, _, _, last = right.shape
    if owners_right:
        rows = left.reshape(*owners_left, -1, bond)
        product = rows @ right.reshape(*owners_right, bond, -1)
    else:  # one product for the rows of all experts
        product = left.reshape(-1, bond) @ right.reshape(bond, -1)
    return product.reshape(*(owners_left or owners_right), first, -1, last)


def _outputs_first(
    xp: Backend, segment: Array, legs: Sequence[tuple[int, int]]
) -> tuple[Array, list[tuple[int, int]]]:
    """Permute a segment (..., D, out · in · out · in …, D') to (..., D, out · out … · in …, D')."""
    *owners, left, _, right = segment.shape
    # Legs of size 1 are left out: libraries limit the number of axes.
    sizes = [size for leg in legs for size in leg if size > 1]
    sides = [side for leg in legs for side, size in enumerate(leg) if size > 1]
    before = len(owners) + 1
    axes = (before + axis for axis in sorted(range(len(sizes)), key=sides.__getitem__))
    ordered = xp.permute(
        segment.reshape(*owners, left, *sizes, right),
        [*range(before), *axes, before + len(sizes)],
    )
    out, in_ = (prod(leg[axis] for leg in legs) for axis in (0, 1))
    return ordered.reshape(*owners, left, out * in_, right), [(out, in_)]


@lru_cache(maxsize=4096)
def _merge_order(cores: CoreShapes) -> tuple[int, ...]:
    """Return the best order of merges: which segment takes in its right neighbour next."""
    segments = [(site, site + 1) for site in range(len(cores))]
    merges, remaining = [], list(segments)
    for step in neighbours_path(cores):
        merged = [remaining.pop(term) for term in sorted(step, reverse=True)]
        start, stop = min(merged)[0], max(merged)[1]
        remaining.append((start, stop))
        site = segments.index(min(merged))
        segments[site : site + 2] = [(start, stop)]
        merges.append(site)
    return tuple(merges)


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
