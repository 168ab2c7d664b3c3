"""Checks of arrays that come from a caller."""

from __future__ import annotations

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES, REAL_DTYPES
from tnmoe.errors import InputError

_KNOWN = (*REAL_DTYPES, *COMPLEX_DTYPES)
# Their names, for messages.
KNOWN_DTYPES = ", ".join(_KNOWN)


def check_dtype(xp: Backend, array: Array, demand: str) -> str:
    """Return the name of an array's dtype; raise an InputError if tnmoe cannot compute with it.

    The message begins with ``demand``, such as "cores must be floating-point or complex".
    """
    name = xp.dtype_name(array)
    if name not in _KNOWN:
        raise InputError(f"{demand}, got dtype {name}")
    if name == "bfloat16":  # other libraries register it with NumPy, which cannot convert to it
        try:
            xp.astype(array, name)
        except TypeError as error:
            raise InputError(f"{demand}, got dtype {name}: {error}") from error
    return name


def check_cores(cores: tuple[Array, ...]) -> Backend:
    """Return the backend of cores; raise an InputError unless they chain and have one dtype."""
    if not cores:
        raise InputError("an MPO needs at least one core, got none")
    xp = get_backend(cores[0])
    names = {xp.dtype_name(core) for core in cores if get_backend(core) is xp}
    if any(get_backend(core) is not xp for core in cores) or len(names) > 1:
        kinds = [f"{type(core).__module__}.{core.dtype}" for core in cores]
        raise InputError(f"all cores need one library and one dtype, got {kinds}")
    shapes = [tuple(core.shape) for core in cores]
    if any(len(core) != 4 for core in shapes):
        raise InputError(f"every core needs axes (left bond, out, in, right bond), got {shapes}")
    lefts = [core[0] for core in shapes] + [1]
    rights = [1] + [core[3] for core in shapes]
    if lefts != rights:
        raise InputError(
            f"neighbouring cores need equal bonds and the outermost bonds must be 1, got {shapes}"
        )
    if 0 in lefts:
        raise InputError(f"bonds must be at least 1, got {shapes}")
    check_dtype(xp, cores[0], "cores must be floating-point or complex")
    return xp
