"""An optimiser's steps: found behind wrappers, and hooked into once each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from tnmoe.errors import InputError

Arguments = tuple[tuple, dict[str, Any]]


class StepHook:
    """Call functions before and after every step of an optimiser, until removed.

    Torch runs its own hooks once per class whose ``step`` calls its parent's; these run once per
    step, around all of it.

    Parameters
    ----------
    optimizer : Optimizer
    before : callable, optional
        Takes the arguments of ``step``, as a tuple and a dict, and returns those to go on with.
    after : callable, optional
        Takes nothing; not called if the step raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[tuple, dict[str, Any]], Arguments] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._before, self._after = before, after
        # Calls of step that have begun, outermost first. One that raised never says that it
        # ended, but its frame is no longer on the stack.
        self._calls: list[FrameType] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def _enter(self, _: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Arguments | None:
        caller = sys._getframe(1)
        self._calls = [*_still_running(self._calls, caller), caller]
        if len(self._calls) > 1 or self._before is None:
            return None
        # The first argument is the optimiser itself.
        positional, kwargs = self._before(args[1:], kwargs)
        return (args[0], *positional), kwargs

    def _leave(self, *_: Any) -> None:
        self._calls = _still_running(self._calls, sys._getframe(1))[:-1]
        if not self._calls and self._after is not None:
            self._after()

    def remove(self) -> None:
        """Detach from the optimiser."""
        self._calls = []
        for handle in self._handles:
            handle.remove()


def _still_running(frames: list[FrameType], caller: FrameType) -> list[FrameType]:
    """Those of the frames that are on the stack of ``caller``, itself included."""
    if not frames:
        return []
    stack = set()
    frame: FrameType | None = caller
    while frame is not None:
        stack.add(frame)
        frame = frame.f_back
    return [each for each in frames if each in stack]


def innermost(optimizer: Any, otherwise: str = "") -> Optimizer:
    """The torch optimiser itself, or the one that a wrapper holds.

    Parameters
    ----------
    optimizer : Optimizer, or a wrapper with one as ``optimizer`` or ``optim``
        Accelerate's is of the first kind, torch's ``PostLocalSGDOptimizer`` of the second.
    otherwise : str
        What the error says to do instead.

    Raises
    ------
    InputError
        If it is neither.
    """
    found = optimizer
    while isinstance(inner := _held_by(found), Optimizer):
        found = inner
    if not _takes_hooks(found):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}{otherwise}"
        )
    return found


def _held_by(optimizer: Any) -> Any:
    # An optimiser with an "optim" may hold a part of its parameters there, as torch's
    # ZeroRedundancyOptimizer does; its own hooks come first.
    inner = None if _takes_hooks(optimizer) else getattr(optimizer, "optim", None)
    return getattr(optimizer, "optimizer", inner)


def _takes_hooks(optimizer: Any) -> bool:
    # A wrapper may be an Optimizer by name only, and have set nothing up.
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
