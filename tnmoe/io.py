"""Saving and loading MPOs as safetensors: no pickle, nothing half-written."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors import SafetensorError, safe_open

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES
from tnmoe.errors import InputError, one_of
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared import SharedMPO

_FORMAT = "1"


def save(path: str | os.PathLike, obj: MPO | SharedMPO) -> None:
    """Write an MPO or a SharedMPO to one safetensors file.

    The file is written beside its place and renamed into it, so that an interrupted save leaves
    an older file as it was.

    Parameters
    ----------
    path : path
        File to write; replaced if it exists.
    obj : MPO or SharedMPO
        What to save. Complex cores are stored as pairs of real numbers.

    Raises
    ------
    TypeError
        If ``obj`` is neither.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile, pathlib
    >>> mpo = MPO([np.ones((1, 2, 2, 3)), np.ones((3, 2, 1, 1))])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pathlib.Path(folder) / "mpo.safetensors", mpo)
    ...     load(pathlib.Path(folder) / "mpo.safetensors")
    MPO(4×2, sites=2, bond_dims=(3,), num_params=18, dtype=float64, center=None)
    """
    if isinstance(obj, MPO):
        arrays = {f"cores.{site}": core for site, core in enumerate(obj.cores)}
    elif isinstance(obj, SharedMPO):
        arrays = {f"aux.{site}": core for site, core in enumerate(obj.aux)}
        arrays["center_core"] = obj.center_core
    else:
        raise TypeError(f"expected an MPO or a SharedMPO, got {type(obj).__qualname__}")
    some = next(iter(arrays.values()))
    xp = get_backend(some)
    description = {
        "kind": type(obj).__name__,
        "library": xp.name,
        "dtype": xp.dtype_name(some),
        "out_dims": obj.shape.out_dims,
        "in_dims": obj.shape.in_dims,
        "out_features": obj.shape.out_features,
        "in_features": obj.shape.in_features,
        "center": obj.center,
    }
    metadata = {"tnmoe": json.dumps(description), "tnmoe_format": _FORMAT}
    stored = {name: _as_stored(array) for name, array in arrays.items()}
    contents = import_module(f"safetensors.{xp.name}").save(stored, metadata)
    _write_atomically(Path(path), contents)


def load(path: str | os.PathLike, library: str | None = None) -> MPO | SharedMPO:
    """Read back what :func:`save` wrote.

    Parameters
    ----------
    path : path
        File to read.
    library : {"numpy", "torch"}, optional
        Array library of the result (on the CPU); by default the one it was saved from.

    Returns
    -------
    MPO or SharedMPO

    Raises
    ------
    InputError
        If the file is damaged or was not written by :func:`save`.
    OSError
        If the file cannot be read.
    """
    try:
        description, arrays = _read(path, library)
        shape = MPOShape(*(description[key] for key in _SHAPE_KEYS))
        center = description["center"]
        if description["kind"] == "SharedMPO":
            aux = [arrays[f"aux.{site}"] for site in range(shape.sites - 1)]
            return SharedMPO(arrays["center_core"], aux, shape, center)
        return MPO([arrays[f"cores.{site}"] for site in range(shape.sites)], shape, center)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold what tnmoe.save writes: {error!r}") from error


_SHAPE_KEYS = ("out_dims", "in_dims", "out_features", "in_features")


_FRAMEWORKS = {"numpy": "np", "torch": "pt"}


def _read(path: str | os.PathLike, library: str | None) -> tuple[dict, dict[str, Array]]:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    if metadata.get("tnmoe_format") != _FORMAT:
        raise InputError(
            f"{path} was not written by this version of tnmoe.save: expected format {_FORMAT}, "
            f"found {metadata.get('tnmoe_format')}"
        )
    description = json.loads(metadata["tnmoe"])
    library = library or description["library"]
    one_of("library", library, _FRAMEWORKS)
    if library == "numpy" and description["dtype"] == "bfloat16":
        raise InputError(f"{path} holds bfloat16, which NumPy lacks: load it with library='torch'")
    with safe_open(path, framework=_FRAMEWORKS[library]) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if description["dtype"] in COMPLEX_DTYPES:
        arrays = {name: array[0] + 1j * array[1] for name, array in arrays.items()}
    return description, arrays


def _as_stored(array: Array) -> Array:
    """A contiguous real copy; complex numbers as (real, imaginary) along a new first axis."""
    xp = get_backend(array)
    if xp.dtype_name(array) in COMPLEX_DTYPES:
        return xp.stack([array.real, array.imag])
    return xp.stack([array])[0]


def _write_atomically(path: Path, contents: bytes) -> None:
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
