"""What modules hold, to see later whether it is still the same."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from weakref import ref

from torch import nn


class Snapshot:
    """The parameters, submodules and routes of modules without hooks.

    Parameters
    ----------
    modules : iterable of Module

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> snapshot = Snapshot([linear])
    >>> snapshot.is_current()
    True
    >>> linear.bias = None
    >>> snapshot.is_current()
    False
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Whoever keeps a snapshot of a module does not keep the module.
        self._held = [(ref(module), _held_by(module)) for module in modules]

    def is_current(self) -> bool:
        """Return whether the modules hold the same objects, and no calls have hooks."""
        for reference, held in self._held:
            module = reference()
            if module is None or has_hooks(module):
                return False
            now = _held_by(module)
            if len(now) != len(held) or not all(map(is_, now, held)):
                return False
        return True


def _held_by(module: nn.Module) -> list[object]:
    values = vars(module)
    return [
        *values["_parameters"].values(),
        *values["_modules"].values(),
        values.get("route"),
        values.get("base"),  # of an adapter: a module that belongs to another part of the model
    ]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module does more than run the forward of its class."""
    values = vars(module)
    return bool(
        # accelerate replaces the method of the instance.
        "forward" in values
        or values["_forward_hooks"]
        or values["_forward_pre_hooks"]
        or values["_backward_hooks"]
        or values["_backward_pre_hooks"]
    )
