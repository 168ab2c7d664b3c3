"""Values that a block of code sets for modules, in its own thread or task only."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
from torch import nn

from tnmoe.nn.transforms import caller_context, in_backward

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class ScopedValues(Generic[T]):
    """Values for modules that last as long as a block of code.

    The values live in a context of :mod:`contextvars`: another thread, or another task of asyncio,
    does not see them unless it runs in a copy of this context. A backward pass sees the values of
    the code that called it. Compiled code cannot read contexts; it sees the values that its own
    thread added.

    Parameters
    ----------
    name : str
        Attribute in which replicas of modules keep their values.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_context: ContextVar[tuple[dict[int, T], ...]] = ContextVar(name, default=())
        self._in_thread = _ThreadValues()

    def add(self, values: dict[int, T]) -> None:
        """Add values as a block begins, with the modules' ``id`` as keys."""
        if torch.compiler.is_compiling():
            self._in_thread.compiled.append(values)
        else:
            self._in_context.set((*filter(None, self._in_context.get()), values))
            self._in_thread.eager.append(values)

    def remove(self, values: dict[int, T]) -> None:
        """Empty and remove values as their block ends.

        Blocks may end in any order, and elsewhere than they began: in generators, in another
        thread, or in compiled code although they began outside it.
        """
        values.clear()
        for blocks in (self._in_thread.compiled, self._in_thread.eager):
            for position in reversed(range(len(blocks))):
                if not blocks[position]:
                    del blocks[position]
        if not torch.compiler.is_compiling():
            self._in_context.set(tuple(filter(None, self._in_context.get())))

    def values_for(self, module: object) -> list[T]:
        """Return the values for a module; the value of the innermost block comes last."""
        local = self._in_thread
        if torch.compiler.is_compiling():
            blocks = (*local.eager, *local.compiled)
        else:
            in_context = (
                caller_context().get(self._in_context, ())
                if in_backward()
                else self._in_context.get()
            )
            blocks = (*in_context, *local.compiled)
        key = id(module)
        # Another thread may empty a block's values at the same time.
        found = [values.get(key) for values in blocks]
        inherited: tuple[T, ...] = vars(module).get(self._name, ())
        return [*inherited, *(value for value in found if value is not None)]

    def copy_to_replica(self, module: nn.Module, replica: M) -> M:
        """Give a replica the values of its module in this thread: another thread may call it."""
        setattr(replica, self._name, tuple(self.values_for(module)))
        return replica


class _ThreadValues(threading.local):
    """The values that code of this thread added, compiled or not."""

    def __init__(self) -> None:  # called in every thread
        self.compiled: list[dict] = []
        self.eager: list[dict] = []
