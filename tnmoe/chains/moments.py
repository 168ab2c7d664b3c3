"""Second moments of inputs, which weigh the errors of the matrices that the inputs meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES
from tnmoe.chains.precision import computable
from tnmoe.chains.scaling import finite_max_abs
from tnmoe.errors import InputError, check_number_in


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs that the matrices of experts meet.

    Attributes
    ----------
    xp : Backend
        Library of the moments.
    matrices : array, shape (E, in, in) or (1, in, in)
        Hermitian and positive. The error of an expert is ‖(W − chain) · S^½‖.
    out_dims, in_dims : sequence of int
        Legs of the sites.
    """

    xp: Backend
    matrices: Array
    out_dims: Sequence[int]
    in_dims: Sequence[int]

    def apply(self, targets: Array) -> Array:
        """Multiply matrices by the moments; (E, legs in the order of the sites)."""
        count = targets.shape[0]
        # Legs of size 1 are left out: libraries limit the number of axes.
        pairs = list(zip(self.out_dims, self.in_dims, strict=True))
        legs = [(side, size) for pair in pairs for side, size in enumerate(pair) if size > 1]
        order = sorted(range(len(legs)), key=lambda axis: legs[axis][0])
        back = sorted(range(len(legs)), key=order.__getitem__)
        sizes = [size for _, size in legs]
        tensor = self.xp.permute(targets.reshape(count, *sizes), [0, *(axis + 1 for axis in order)])
        rows = tensor.reshape(count, -1, prod(self.in_dims)) @ self.matrices
        tensor = rows.reshape(-1, *(sizes[axis] for axis in order))
        return self.xp.permute(tensor, [0, *(axis + 1 for axis in back)]).reshape(count, -1)


def damped_moments(xp: Backend, weights: Array, matrices: Array, damping: float) -> Array:
    """Check second moments; bring their mean eigenvalue to 1, and add the identity's share.

    Parameters
    ----------
    xp : Backend
        Library of the matrices.
    weights : array, shape (E, in, in) or (in, in)
        Second moments of the inputs.
    matrices : array, shape (E, out, in) or (out, in)
        What the inputs meet.
    damping : float
        Share of the identity.

    Returns
    -------
    array, shape (E, in, in) or (1, in, in)
        Moments of zeros, of an expert without inputs, become the identity.

    Raises
    ------
    InputError
        If the moments have another shape, are not Hermitian and positive, or hold NaN or infinity.
    TypeError
        If they belong to another library.
    """
    damping = check_number_in("damping", damping, "[0, 1]")
    *experts, _, size = matrices.shape
    if get_backend(weights) is not xp:
        raise TypeError(
            f"weights must be an array of {xp.name}, as the matrices are, got {type(weights)}"
        )
    expected = list(dict.fromkeys([(*experts, size, size), (size, size)]))
    if tuple(weights.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise InputError(f"weights must have shape {shapes}, got {tuple(weights.shape)}")
    dtype = xp.dtype_name(computable(xp, matrices))
    if xp.dtype_name(weights) in COMPLEX_DTYPES and dtype not in COMPLEX_DTYPES:
        raise InputError(f"the weights of real matrices must be real, got {xp.dtype_name(weights)}")
    largest = finite_max_abs(xp, weights, "the weights contain")
    # Their scale means nothing. Without it, no sum of them overflows.
    moments = xp.astype(weights / (largest or 1.0), dtype).reshape(-1, size, size)
    if xp.max_abs(moments - xp.adjoint(moments)) > 1e-3:
        raise InputError("weights must be Hermitian matrices: they are second moments of inputs")
    means = [number_of(xp, xp.trace(each, 0, 1).real) / size for each in moments]
    if min(means) < 0:
        raise InputError(
            f"weights must be positive matrices, got one with mean eigenvalue {min(means):.3g}"
        )
    scales = np.array([(1 - damping) / mean if mean else 0.0 for mean in means])
    shares = np.array([damping if mean else 1.0 for mean in means])
    scaled = moments * xp.from_numpy(scales[:, None, None], like=moments)
    identity = xp.eye(size, like=moments)[None]
    return scaled + identity * xp.from_numpy(shares[:, None, None], like=moments)


def of_expert(moments: Array, number: int) -> Array:
    """Return an expert's moments, from those of all experts, (E, in, in), or common ones."""
    return moments[number if moments.shape[0] > 1 else 0]


def weighted_norm(xp: Backend, matrix: Array, norm: float, moments: Array) -> float:
    """Return sqrt(tr(W S Wᴴ)); ``norm`` is that of W, by which W is divided first."""
    if not norm:
        return 0.0
    root = norm**0.5
    scaled = matrix / root / root
    return max(0.0, inner_product(xp, scaled, scaled @ moments)) ** 0.5 * norm


def inner_product(xp: Backend, first: Array, second: Array) -> float:
    """Return the real part of the inner product of two arrays."""
    row, column = xp.conj(first).reshape(1, -1), second.reshape(-1, 1)
    return number_of(xp, (row @ column)[0, 0].real)


def number_of(xp: Backend, array: Array) -> float:
    """Return an array of one number as a number, without its gradient."""
    return float(xp.to_numpy(array))
