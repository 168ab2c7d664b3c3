"""Saving and loading of MPOs as safetensors: no pickle, and no half-written file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from tnmoe.backends import Array, Backend, available_backends, backend_named, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES, REAL_DTYPES
from tnmoe.errors import InputError, check_index, check_one_of, short_repr
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO
from tnmoe.system.durable import write_atomically
from tnmoe.system.files import parse_json, read_safetensors_header
from tnmoe.system.memory import explain_memory_error

# Written into every file; a change of the format gets a new number.
_FORMAT = 2


def save(path: str | os.PathLike, obj: MPO | SharedMPO) -> None:
    """Write an MPO or a SharedMPO to one safetensors file.

    :func:`save` writes a temporary file beside ``path``, syncs it and renames it. An interrupted
    save leaves an existing file as it was, even after a power cut.

    Parameters
    ----------
    path : path
        File to write. An existing file is replaced.
    obj : MPO or SharedMPO
        The operator to save, from any array library. Complex numbers are stored as pairs of real
        numbers, bfloat16 numbers as their 16 bits.

    Raises
    ------
    TypeError
        If ``obj`` is neither an MPO nor a SharedMPO.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile, pathlib
    >>> mpo = MPO([np.ones((1, 2, 2, 3)), np.ones((3, 2, 1, 1))])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pathlib.Path(folder) / "mpo.safetensors", mpo)
    ...     load(pathlib.Path(folder) / "mpo.safetensors")
    MPO(4×2, sites=2, bond_dims=(3,), num_params=18, dtype=float64, center_site=None)
    """
    if not isinstance(obj, MPO | SharedMPO):
        raise TypeError(f"expected an MPO or a SharedMPO, got {type(obj).__qualname__}")
    base = obj.base if isinstance(obj, SharedMPO) else None
    arrays = {f"cores.{site}": core for site, core in enumerate(obj.cores)}
    if base is not None:
        arrays |= {f"base.{site}": core for site, core in enumerate(base.cores)}
    xp = get_backend(obj.cores[0])
    description = {
        "format": _FORMAT,
        "kind": type(obj).__name__,
        "library": xp.name,
        "dtype": xp.dtype_name(obj.cores[0]),
        **_described(obj),
        "base": None if base is None else _described(base),
    }
    stored = {name: _as_stored(xp, array) for name, array in arrays.items()}
    # One entry: safetensors writes several in an order that changes from call to call.
    contents = safetensors.numpy.save(stored, {"tnmoe": json.dumps(description)})
    write_atomically(Path(path), contents)


def _described(chain: MPO | SharedMPO) -> dict[str, Any]:
    """Describe what the arrays of a chain do not tell."""
    shape = chain.shape
    return {
        "out_dims": shape.out_dims,
        "in_dims": shape.in_dims,
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        "center_site": chain.center_site,
    }


def load(path: str | os.PathLike, library: str | None = None) -> MPO | SharedMPO:
    """Read a file that :func:`save` wrote.

    Parameters
    ----------
    path : path
        File to read.
    library : str, optional
        Array library of the result: "numpy", "torch", "jax", "cupy" or the name of a registered
        backend. By default the library of the saved operator. Arrays are on the CPU, those of CuPy
        on the current device.

    Returns
    -------
    MPO or SharedMPO

    Raises
    ------
    InputError
        If ``path`` is a folder, is damaged, or was not written by :func:`save`; if there is no
        such library, or the library lacks the dtype.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "identity.safetensors")
    >>> save(path, MPO.identity(MPOShape((2, 2), (2, 2))))
    >>> load(path).trace().item()
    4.0
    """
    if os.path.isdir(path):
        raise InputError(
            f"{path} is a folder: tnmoe.load reads a file that tnmoe.save wrote; use "
            "tnmoe.hf.from_pretrained for a converted model"
        )
    read_safetensors_header(path)
    try:
        description, arrays = _read(path, library)
        return _rebuild(path, description, arrays)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} does not hold what tnmoe.save writes: {error!r}") from error


def _read(path: str | os.PathLike, library: str | None) -> tuple[dict, dict[str, Array]]:
    """Read the description and the arrays of a file, the arrays in the given library."""
    with explain_memory_error(f"reading {path}"), safe_open(path, framework="np") as file:
        entry = (file.metadata() or {}).get("tnmoe", "{}")
        description = parse_json(entry, f"the description in {path}")
        if description.get("format") != _FORMAT:
            raise InputError(
                f"{path} was not written by this version of tnmoe.save: expected format {_FORMAT}, "
                f"found {short_repr(description.get('format'))}"
            )
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    library, dtype = library or description["library"], description["dtype"]
    check_one_of("library", library, available_backends())
    check_one_of(f"the dtype in {path}", dtype, (*REAL_DTYPES, *COMPLEX_DTYPES))
    xp = backend_named(library)
    arrays = {name: xp.from_numpy(_from_stored(array, dtype)) for name, array in stored.items()}
    try:
        return description, {name: xp.astype(array, dtype) for name, array in arrays.items()}
    except TypeError as error:
        raise InputError(
            f"{path} holds {dtype}, which {library} lacks: load it with another library ({error})"
        ) from error


def _rebuild(
    path: str | os.PathLike, description: dict, arrays: dict[str, Array]
) -> MPO | SharedMPO:
    """Build the operator again from its description and its arrays."""
    check_one_of(f"the kind in {path}", description["kind"], ("MPO", "SharedMPO"))
    try:
        if description["kind"] == "MPO":
            rebuilt: MPO | SharedMPO = _mpo(description, _chain("cores", arrays))
        else:
            rebuilt = _shared_mpo(description, arrays)
        if arrays:
            raise InputError(f"it has more arrays, {short_repr(sorted(arrays))}")
    except InputError as error:
        raise InputError(f"{path} does not hold what tnmoe.save writes: {error}") from error
    return rebuilt


def _shared_mpo(description: dict, arrays: dict[str, Array]) -> SharedMPO:
    cores, base = _chain("cores", arrays), description["base"]
    center_site = check_index("center_site", description["center_site"], len(cores))
    if base is not None:
        base = _mpo(base, _chain("base", arrays))
    return SharedMPO(cores, _shape(description, cores), center_site, base)


def _mpo(description: dict, cores: Sequence[Array]) -> MPO:
    return MPO(cores, _shape(description, cores), description["center_site"])


def _chain(name: str, arrays: dict[str, Array]) -> list[Array]:
    """Take the cores ``name.0``, ``name.1``, … out of the arrays."""
    cores: list[Array] = []
    while (core := arrays.pop(f"{name}.{len(cores)}", None)) is not None:
        cores.append(core)
    return cores


def _shape(description: dict, cores: Sequence[Array]) -> MPOShape:
    """Return the described shape; raise an InputError unless the legs of the cores agree with it.

    The check comes first, so that a hostile description is never computed with.
    """
    out, in_ = ([int(core.shape[axis]) for core in cores] for axis in (-3, -2))
    described = [description[f"{side}_dims"] for side in ("out", "in")]
    if described != [out, in_]:
        raise InputError(
            f"the cores have (out, in) legs {short_repr([out, in_])}, "
            f"which do not fit {short_repr(described)}"
        )
    return MPOShape(out, in_, description["out_features"], description["in_features"])


def _as_stored(xp: Backend, array: Array) -> np.ndarray:
    """Return a contiguous array of a dtype that both safetensors and NumPy know.

    Complex numbers become (real, imaginary) along a new first axis. A bfloat16 number becomes the
    upper half of the float32 that NumPy holds for it.
    """
    numbers, dtype = xp.to_numpy(array), xp.dtype_name(array)
    if dtype in COMPLEX_DTYPES:
        numbers = np.stack([numbers.real, numbers.imag])
    if dtype == "bfloat16":
        numbers = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(numbers)


def _from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Undo :func:`_as_stored`; bfloat16 numbers come back as float32."""
    if dtype in COMPLEX_DTYPES:
        if stored.ndim == 0 or len(stored) != 2:
            raise TypeError(f"expected real and imaginary parts, got shape {stored.shape}")
        numbers = np.empty(stored.shape[1:], dtype)
        numbers.real, numbers.imag = stored
        return numbers
    if dtype == "bfloat16":
        if stored.dtype != np.uint16:
            raise TypeError(f"expected the bits of bfloat16 as uint16, got {stored.dtype}")
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored
