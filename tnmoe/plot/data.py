"""Checks of the data to draw: they return arrays of the right shape, or raise an InputError."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from tnmoe.backends import get_backend
from tnmoe.errors import InputError

# What a message calls arrays with this number of axes.
_KINDS = {1: "a sequence", 2: "a table"}


def check_numbers(
    name: str, values: Any, axes: int = 1, lowest: float = -np.inf, gaps: bool = False
) -> np.ndarray:
    """Return an array of at least one real number, with the given number of axes.

    NaN and infinity are allowed only with ``gaps``, which lines leave out.
    """
    with suppress(TypeError):  # a list belongs to no array library
        values = get_backend(values).to_numpy(values)
    try:
        array = np.asarray(values, dtype=None if np.iscomplexobj(values) else float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be {_KINDS[axes]} of numbers: {error}") from error
    if array.ndim != axes or array.size == 0 or np.iscomplexobj(array):
        raise InputError(
            f"{name} must be {_KINDS[axes]} of real numbers, at least one, "
            f"got {array.dtype} of shape {array.shape}"
        )
    wrong = (array < lowest) | (~np.isfinite(array) & (not gaps))
    if wrong.any():
        above = "" if lowest == -np.inf else f" and at least {lowest:g}"
        raise InputError(f"{name} must be finite{above}, got {array[wrong][0]}")
    return array


def check_mapping(name: str, values: Any) -> Mapping[Any, Any]:
    """Return the mapping; raise an InputError unless it is one and has an entry."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name} must be a mapping from names, got {type(values).__qualname__}")
    if not values:
        raise InputError(f"{name} must have at least one entry, got {values!r}")
    return values
