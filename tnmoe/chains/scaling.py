"""Scaling by powers of two, which is exact, so that no square over- or underflows."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, isfinite

from tnmoe.backends import Array, Backend
from tnmoe.errors import InputError

# Binary orders of magnitude around 1 at which the entries of a core stay as they are.
_NEAR_ONE = 8


def exponent_of(xp: Backend, array: Array, near: int, subject: str) -> int:
    """Find the power of two to divide an array by, so that its largest entry is from 1 to 2.

    The exponent is 0 for an array without numbers.

    Parameters
    ----------
    xp : Backend
        Library of the array.
    array : array
        Any shape.
    near : int
        Exponents up to this size count as 0; zeros have the exponent 0, too.
    subject : str
        Subject and verb of the message about NaN or infinity.

    Raises
    ------
    InputError
        If an entry is NaN or infinite.
    """
    if not xp.has_numbers(array):
        return 0
    largest = finite_max_abs(xp, array, subject)
    exponent = frexp(largest)[1] - 1 if largest else 0
    return 0 if abs(exponent) <= near else exponent


def finite_max_abs(
    xp: Backend, array: Array, subject: str = "the cores of an operator contain"
) -> float:
    """Return the largest absolute entry; raise an InputError if one is NaN or infinite."""
    largest = xp.max_abs(array)
    if not isfinite(largest):
        raise InputError(f"{subject} NaN or infinity")
    return largest


def check_finite(xp: Backend, array: Array) -> None:
    """Raise an InputError if an entry of a core is NaN or infinite, as far as numbers are known."""
    if xp.has_numbers(array):
        finite_max_abs(xp, array)


def normalized(xp: Backend, core: Array) -> tuple[Array, int]:
    """Divide a core by a power of two, so that its largest entry is near 1.

    Returns
    -------
    array
        The core itself where its largest entry is near 1 already.
    int
        The exponent.
    """
    exponent = exponent_of(xp, core, _NEAR_ONE, "the cores of an operator contain")
    return times_power(core, -exponent), exponent


def normalized_chains(
    xp: Backend, chains: Sequence[Sequence[Array]]
) -> tuple[list[list[Array]], int]:
    """Divide chains by one power of two, so that their products can be squared.

    Returns
    -------
    list of list of array
        The cores of the largest chain have entries near 1. The other chains are as small beside
        it as before.
    int
        The exponent.
    """
    pairs = [[normalized(xp, core) for core in chain] for chain in chains]
    exponents = [sum(exponent for _, exponent in chain) for chain in pairs]
    # The exponents of a chain that is zero mean nothing.
    nonzero = [
        all(not xp.has_numbers(core) or xp.max_abs(core) for core, _ in chain) for chain in pairs
    ]
    largest = max((e for e, counts in zip(exponents, nonzero, strict=True) if counts), default=0)
    scaled = [[core for core, _ in chain] for chain in pairs]
    for cores, exponent, counts in zip(scaled, exponents, nonzero, strict=True):
        cores[-1] = times_power(cores[-1], exponent - largest) if counts else cores[-1]
    return scaled, largest


def times_power(array: Array, exponent: int) -> Array:
    """Multiply an array by a power of two: by two factors, which fit where the result fits."""
    if exponent == 0:
        return array
    half = exponent // 2
    return array * 2.0**half * 2.0 ** (exponent - half)
