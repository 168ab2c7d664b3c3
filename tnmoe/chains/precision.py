"""The precision of a computation, and the way back to the caller's without overflow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import COMPUTE_DTYPE, LARGEST, WIDE_DTYPE
from tnmoe.errors import InputError


def computable(xp: Backend, array: Array) -> Array:
    """Return the array in a dtype that has linear algebra: half precision becomes single."""
    name = xp.dtype_name(array)
    return xp.astype(array, COMPUTE_DTYPE.get(name, name))


def in_one_dtype(xp: Backend, arrays: Iterable[Array]) -> list[Array]:
    """Return arrays in NumPy's common dtype for them, or in single precision at least."""
    arrays = list(arrays)
    names = {xp.dtype_name(array) for array in arrays}
    if len(names) == 1 and names.isdisjoint(COMPUTE_DTYPE):
        return arrays
    arrays = [computable(xp, array) for array in arrays]
    common = np.result_type(*{xp.dtype_name(array) for array in arrays}).name
    return [xp.astype(array, common) for array in arrays]


def widened(xp: Backend, array: Array) -> Array:
    """Return the array in double precision; an array without numbers only as ``computable``."""
    array = computable(xp, array)
    name = xp.dtype_name(array)
    return xp.astype(array, WIDE_DTYPE.get(name, name)) if xp.has_numbers(array) else array


def all_widened(xp: Backend, cores: Iterable[Array]) -> list[Array]:
    """Return the cores of a computation in double precision, if all have numbers."""
    cores = list(cores)
    convert = widened if all(map(xp.has_numbers, cores)) else computable
    return [convert(xp, core) for core in cores]


def as_spectrum(xp: Backend, values: Array) -> np.ndarray:
    """Return Schmidt values in NumPy's double precision: NaN for values without numbers."""
    if xp.has_numbers(values):
        return xp.to_numpy(values).astype(np.float64)
    return np.full(tuple(values.shape), np.nan)


def precise(xp: Backend, array: Array) -> Array:
    """Return the array in a dtype whose products lose nothing that its own numbers hold.

    That is double precision, or single precision for an array in half precision.
    """
    return (computable if xp.dtype_name(array) in COMPUTE_DTYPE else widened)(xp, array)


def narrowed(xp: Backend, cores: Iterable[Array], dtype: str) -> list[Array]:
    """Return computed cores in the caller's dtype.

    Raises
    ------
    InputError
        If an entry is too large for it. A core in canonical form may have the norm of the whole
        operator, which can be too large although every entry of the matrix fits.
    """
    cores = list(cores)
    for core in cores:
        if xp.dtype_name(core) != dtype:
            check_range(xp, core, dtype)
    return [xp.astype(core, dtype) for core in cores]


def check_range(xp: Backend, core: Array, dtype: str, factor: float = 1.0) -> None:
    """Raise an InputError if an entry, times a factor, is too large for a dtype."""
    if not xp.has_numbers(core):
        return
    largest = xp.max_abs(core) * factor
    if largest > LARGEST[dtype]:
        raise InputError(
            f"a core would have an entry of {largest:.3g}, more than {dtype} can hold "
            f"({LARGEST[dtype]:.3g}): scale the operator down, or give a wider dtype"
        )
