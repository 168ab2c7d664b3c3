"""What blocks of code tell modules: in the thread or task alone that runs the block."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
from torch import nn

from tnmoe.nn.transforms import caller_context

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Scope(Generic[T]):
    """Values for modules, each for the length of a block of code.

    They are those of a context of :mod:`contextvars`: another thread, or another task of asyncio,
    sees nothing of them unless it runs in a copy of this context. A backward pass has those of
    whoever called it. Compiled code cannot read contexts; it sees what its thread has put here.

    Parameters
    ----------
    name : str
        An attribute of modules that replicas keep their values in.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_context: ContextVar[tuple[dict[int, T], ...]] = ContextVar(name, default=())
        self._in_thread = _InThread()

    def put(self, values: dict[int, T]) -> None:
        """Add values, by the identities of the modules that they are for."""
        if torch.compiler.is_compiling():
            self._in_thread.compiled.append(values)
        else:
            self._in_context.set((*filter(None, self._in_context.get()), values))
            self._in_thread.eager.append(values)

    def take(self, values: dict[int, T]) -> None:
        """Empty and remove values that were put here.

        Blocks may end in any order, and elsewhere than they began: in generators, in another
        thread, or compiled where they were not before.
        """
        values.clear()
        for held in (self._in_thread.compiled, self._in_thread.eager):
            for position in reversed(range(len(held))):
                if not held[position]:
                    del held[position]
        if not torch.compiler.is_compiling():
            self._in_context.set(tuple(filter(None, self._in_context.get())))

    def of(self, module: object) -> list[T]:
        """Values for a module, those of the innermost block last."""
        local = self._in_thread
        if torch.compiler.is_compiling():
            blocks = (*local.eager, *local.compiled)
        else:
            blocks = (*caller_context().get(self._in_context, ()), *local.compiled)
        key = id(module)
        # Another thread may empty them meanwhile.
        found = [values.get(key) for values in blocks]
        inherited: tuple[T, ...] = getattr(module, self._name, ())
        return [*inherited, *(each for each in found if each is not None)]

    def hand_over(self, module: nn.Module, replica: M) -> M:
        """Let a replica, which another thread may call, have what its module has in this one."""
        setattr(replica, self._name, tuple(self.of(module)))
        return replica


class _InThread(threading.local):
    """What compiled code put here, which runs without a context, and what other code did."""

    def __init__(self) -> None:  # called in every thread
        self.compiled: list[dict] = []
        self.eager: list[dict] = []
