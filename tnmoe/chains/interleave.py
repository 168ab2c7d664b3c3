"""The legs of a matrix in the order of the sites."""

from __future__ import annotations

from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.shapes import MPOShape


def interleave(xp: Backend, matrix: Array, shape: MPOShape, center_site: int) -> Array:
    """Permute a matrix to axes (..., left legs, legs of the centre, right legs)."""
    padded = (shape.padded_out, shape.padded_in)
    if tuple(matrix.shape[-2:]) != padded:
        matrix = xp.pad(matrix, *padded)
    batch = matrix.shape[:-2]
    # Legs of size 1 are left out: libraries limit the number of axes.
    sides = (enumerate(dims) for dims in (shape.out_dims, shape.in_dims))
    legs = [(site, size) for side in sides for site, size in side if size > 1]
    axes = sorted(range(len(legs)), key=lambda axis: legs[axis][0])
    tensor = xp.permute(
        matrix.reshape((*batch, *(size for _, size in legs))),
        [*range(len(batch)), *(len(batch) + axis for axis in axes)],
    )
    left, right = prod(shape.legs[:center_site]), prod(shape.legs[center_site + 1 :])
    return tensor.reshape(*batch, left, shape.legs[center_site], right)
