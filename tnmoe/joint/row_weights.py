"""Weights of output rows: how much an error of each output counts."""

from __future__ import annotations

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.errors import InputError

# Of an expert's largest weight: what every row counts at least. A decomposition in double precision
# sees the root of it, so that even rows of weight 0 get their best fit.
_LEAST = 1e-12


def checked_rows(rows: Array, matrices: Array) -> np.ndarray:
    """Return the weights of the output rows of matrices (E, out, in), as NumPy's float64 (E, out).

    Parameters
    ----------
    rows : array, shape (E, out) or (out,)
        Of any library.
    matrices : array, shape (E, out, in)

    Raises
    ------
    InputError
        If the weights have another shape, are negative, or hold NaN or infinity.
    """
    numbers = np.asarray(get_backend(rows).to_numpy(rows))
    shape = tuple(map(int, matrices.shape[:2]))
    if numbers.shape not in (shape, shape[1:]):
        raise InputError(f"rows must have shape {shape} or {shape[1:]}, got {numbers.shape}")
    if np.iscomplexobj(numbers) or not np.all((numbers >= 0) & np.isfinite(numbers)):
        raise InputError("rows must hold finite numbers from 0 up: they weigh squared errors")
    return np.broadcast_to(numbers.astype(np.float64), shape)


def roots_of_rows(weights: np.ndarray) -> np.ndarray:
    """Return the roots of weights (..., out); no row counts less than 1e-12 of the largest.

    Where all weights are 0, all rows count alike.

    Examples
    --------
    >>> roots_of_rows(np.array([[4.0, 0.0], [0.0, 0.0]])).tolist()
    [[2.0, 2e-06], [1.0, 1.0]]
    """
    largest = weights.max(axis=-1, keepdims=True)
    raised = np.maximum(weights, _LEAST * largest)
    return np.sqrt(np.where(largest > 0, raised, 1.0))
