"""Schmidt values across a bond, and the entropy of their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.canonical import canonicalize
from tnmoe.errors import InputError


def schmidt_values(xp: Backend, cores: Sequence[Array], current: int | None, bond: int) -> Array:
    """Schmidt values across a bond, descending.

    They are the singular values of the operator with the legs left of the bond as rows and those
    right of it as columns.
    """
    centered = canonicalize(xp, cores, current, bond)[bond]
    if not isfinite(xp.max_abs(centered)):
        raise InputError("the cores of an operator contain NaN or infinity")
    return xp.left_svd(centered.reshape(-1, centered.shape[-1]))[1]


def entanglement_entropy(values: np.ndarray) -> float:
    """Entropy −Σ p log p, in nats, of the normalised squares p of Schmidt values.

    It runs from 0 (a product operator, or the zero operator) to the logarithm of the bond
    dimension (all values equal).
    """
    largest = values.max(initial=0.0)
    if largest == 0:
        return 0.0
    with np.errstate(under="ignore"):
        squares = (values / largest).astype(np.float64) ** 2
        weights = squares[squares > 0] / squares.sum()
    return abs(float(-(weights * np.log(weights)).sum()))
