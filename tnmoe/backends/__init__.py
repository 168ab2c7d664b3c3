"""Array libraries behind one small protocol, found by an array's type and imported lazily.

The library ``lib`` is supported when the module ``tnmoe.backends.lib`` exists; adding that one
file is all there is to supporting another.
"""

from __future__ import annotations

import pkgutil
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from tnmoe.backends.protocol import Array, Backend
from tnmoe.errors import InputError

__all__ = ["Array", "Backend", "available_backends", "backend_named", "get_backend"]


@lru_cache(maxsize=1)
def available_backends() -> tuple[str, ...]:
    """Names of the array libraries tnmoe has a backend for, installed or not."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name != "protocol"))


def backend_named(name: str) -> Backend:
    """The backend of the library called ``name``.

    Raises
    ------
    InputError
        If tnmoe has no backend of that name.
    ImportError
        If the library is not installed.
    """
    if name not in available_backends():
        raise InputError(
            f"unknown array library {name!r}; tnmoe has backends for "
            f"{', '.join(available_backends())}"
        )
    return import_module(f"tnmoe.backends.{name}").backend


def get_backend(array: Any) -> Backend:
    """The backend of ``array``, by its type.

    Raises
    ------
    TypeError
        If ``array`` belongs to no supported library.

    Examples
    --------
    >>> import numpy as np
    >>> get_backend(np.eye(2)).name
    'numpy'
    """
    kind: type = type(array)
    return _backend_of_type(kind)


@cache
def _backend_of_type(kind: type) -> Backend:
    for base in kind.__mro__:
        library = base.__module__.partition(".")[0]
        if library in available_backends():
            return backend_named(library)
    raise TypeError(
        f"expected an array of one of {', '.join(available_backends())}, "
        f"got {kind.__module__}.{kind.__qualname__}"
    )
