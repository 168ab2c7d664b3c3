"""Array libraries behind one small protocol, found by an array's type and imported lazily.

The module ``tnmoe.backends.lib`` is the backend of the package ``lib``. To support another library,
add its module; nothing else changes. A backend that lives outside tnmoe is registered.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from threading import RLock
from typing import Any

from tnmoe.backends.protocol import Array, Backend
from tnmoe.errors import InputError
from tnmoe.system.extras import require_extra

__all__ = ["Array", "Backend", "available_backends", "backend_named", "get_backend", "register"]


def __dir__() -> list[str]:
    return list(__all__)


# Modules that backends share; every other one beside them is a backend.
_SHARED = ("numpy_like", "process_setting", "protocol")
_BUILT_IN = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
)
_METHODS = tuple(name for name in vars(Backend) if not name.startswith("_"))

# Packages that hold a library's arrays under another name than its own.
_LIBRARY_OF = {"jaxlib": "jax"}

# Backends from elsewhere, by the types of their arrays.
_registered: dict[type, Backend] = {}
_registering = RLock()


def available_backends() -> tuple[str, ...]:
    """Return the names of the array libraries that have a backend, installed or not."""
    return tuple(sorted({*_BUILT_IN, *(backend.name for backend in list(_registered.values()))}))


def backend_named(name: str) -> Backend:
    """Return the backend of the library called ``name``.

    Raises
    ------
    InputError
        If tnmoe has no backend of that name.
    MissingExtraError
        If the library is not installed.
    """
    for backend in list(_registered.values()):  # another thread may add one
        if backend.name == name:
            return backend
    if name not in _BUILT_IN:
        raise InputError(
            f"unknown array library {name!r}; tnmoe has backends for "
            f"{', '.join(available_backends())}"
        )
    if name != "numpy":
        require_extra(f"the {name} backend", name, name)
    return import_module(f"tnmoe.backends.{name}").backend


def get_backend(array: Any) -> Backend:
    """Return the backend of an array, found by the array's type.

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


def register(backend: Backend, *types: type) -> None:
    """Make tnmoe work with the arrays of another library.

    Parameters
    ----------
    backend : Backend
        The operations of a :class:`Backend` for these arrays.
    *types : type
        Classes of arrays, at least one. Subclasses are found as well.

    Raises
    ------
    TypeError
        If ``backend`` lacks operations of the protocol, which the message names, or ``types`` holds
        something that is not a class.
    InputError
        If ``types`` is empty, a type has a backend already, or another backend has the same name.

    Examples
    --------
    >>> from tnmoe.backends.numpy import NumpyBackend
    >>> class Unfinished(NumpyBackend):
    ...     qr = None
    >>> register(Unfinished(), list)
    Traceback (most recent call last):
    TypeError: Unfinished is not a Backend: it lacks qr
    """
    if isinstance(backend, type):
        raise TypeError(f"register an instance of {backend.__qualname__}, not the class")
    if missing := _missing(backend):
        name = type(backend).__qualname__
        raise TypeError(f"{name} is not a Backend: it lacks {', '.join(missing)}")
    if not types:
        raise InputError(f"the backend {backend.name!r} needs the type of its arrays")
    with _registering:
        if backend.name in available_backends() and backend not in _registered.values():
            raise InputError(f"there is another backend of the name {backend.name!r}")
        for kind in types:
            if not isinstance(kind, type):
                raise TypeError(f"types of arrays must be classes, got {kind!r}")
            if (owner := _owner(kind)) is not None:
                raise InputError(f"{_name_of(kind)} has the backend {owner!r} already")
        _registered.update(dict.fromkeys(types, backend))
        _backend_of_type.cache_clear()


def _missing(backend: Any) -> list[str]:
    """Name the attributes and methods that an object lacks to be a Backend."""
    unnamed = not isinstance(getattr(backend, "name", None), str)
    methods = [name for name in _METHODS if not callable(getattr(backend, name, None))]
    return ["name"] * unnamed + methods


@cache
def _backend_of_type(kind: type) -> Backend:
    """Return the backend of a class or of the nearest base that has one."""
    for base in kind.__mro__:
        if (name := _owner(base)) is not None:
            return backend_named(name)
    raise TypeError(
        f"expected an array of one of {', '.join(available_backends())}, got {_name_of(kind)}"
    )


def _owner(kind: type) -> str | None:
    """Return the name of the backend for a class, without a look at its base classes."""
    if kind in _registered:
        return _registered[kind].name
    package = kind.__module__.partition(".")[0]
    library = _LIBRARY_OF.get(package, package)
    # Not every class of a library is an array: torch also has layers, JAX also has shapes.
    return library if library in _BUILT_IN and hasattr(kind, "reshape") else None


def _name_of(kind: type) -> str:
    """Return the full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"
