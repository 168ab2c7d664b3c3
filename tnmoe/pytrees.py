"""Classes that hold arrays, for libraries that look into such classes: the pytrees of JAX.

The classes name their attributes here, where they need no such library. The backend of a library
registers them with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Attributes:
    """The attributes of a class that holds arrays.

    Attributes
    ----------
    arrays : tuple of str
        Attributes that hold arrays, alone or in containers.
    static : tuple of str
        Attributes that stay as they are when all arrays are replaced by others of their shapes.
    forgotten : tuple of str
        Attributes that depend on the numbers in the arrays, and become None.
    """

    arrays: tuple[str, ...]
    static: tuple[str, ...]
    forgotten: tuple[str, ...] = ()

    def take_apart(self, obj: Any) -> tuple[list[Any], tuple]:
        """Return the values of an object that hold arrays, and those that are static."""
        values = [getattr(obj, name) for name in self.arrays]
        return values, tuple(getattr(obj, name) for name in self.static)

    def rebuild(self, kind: type, static: tuple, values: Any) -> Any:
        """Make an object of its values again, without the checks of its constructor.

        A library may have put anything in the place of an array: shapes, devices, stacked arrays.
        """
        obj: Any = object.__new__(kind)
        attributes = dict.fromkeys(self.forgotten)
        attributes |= zip((*self.arrays, *self.static), (*values, *static), strict=True)
        for name, value in attributes.items():
            object.__setattr__(obj, name, value)
        return obj


# In the order of their definitions.
PYTREES: dict[type, Attributes] = {}


def pytree(**attributes: tuple[str, ...]) -> Callable[[Class], Class]:
    """Mark a class that holds arrays; ``attributes`` are those of :class:`Attributes`."""

    def mark(kind: Class) -> Class:
        PYTREES[kind] = Attributes(**attributes)
        return kind

    return mark
