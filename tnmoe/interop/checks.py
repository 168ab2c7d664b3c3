"""What all conversions need: checks of operators, and one dtype for all cores."""

from __future__ import annotations

from typing import Any

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import in_one_dtype
from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.shapes import is_padded


def check_mpo(mpo: Any) -> None:
    """Raise a TypeError unless the argument is an MPO."""
    if not isinstance(mpo, MPO):
        raise TypeError(f"expected an MPO, got {type(mpo).__qualname__}")


def check_unpadded(mpo: Any) -> None:
    """Raise unless the argument is an MPO without padding, which all libraries can express."""
    check_mpo(mpo)
    if is_padded(mpo.shape):
        raise InputError(f"only tnmoe supports padded shapes: {mpo.shape}")


def in_common_dtype(cores: list[Array]) -> list[Array]:
    """Convert cores to one dtype that holds the numbers of all."""
    xp = get_backend(cores[0])
    one_library = all(get_backend(core) is xp for core in cores)
    if not one_library or len({xp.dtype_name(core) for core in cores}) == 1:
        return cores  # MPO refuses cores of several libraries
    return in_one_dtype(xp, cores)
