"""What callers give to be drawn, as arrays of the right shape; otherwise an InputError."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from tnmoe.backends import get_backend
from tnmoe.errors import InputError

_AXES = {1: "a sequence", 2: "a table"}


def numbers(
    name: str, values: Any, axes: int = 1, lowest: float = -np.inf, gaps: bool = False
) -> np.ndarray:
    """Real numbers with so many axes, at least one; NaN and infinity only where gaps may be."""
    with suppress(TypeError):  # lists belong to no array library
        values = get_backend(values).to_numpy(values)
    try:
        array = np.asarray(values, dtype=None if np.iscomplexobj(values) else float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be {_AXES[axes]} of numbers: {error}") from error
    if array.ndim != axes or array.size == 0 or np.iscomplexobj(array):
        raise InputError(
            f"{name} must be {_AXES[axes]} of real numbers, at least one, "
            f"got {array.dtype} of shape {array.shape}"
        )
    wrong = (array < lowest) | (~np.isfinite(array) & (not gaps))
    if wrong.any():
        above = "" if lowest == -np.inf else f" and at least {lowest:g}"
        raise InputError(f"{name} must be finite{above}, got {array[wrong][0]}")
    return array


def named(name: str, values: Any) -> Mapping[Any, Any]:
    """A mapping from names, with an entry at least."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name} must be a mapping from names, got {type(values).__qualname__}")
    if not values:
        raise InputError(f"{name} must have at least one entry, got {values!r}")
    return values
