"""Hooks into the steps of an optimiser, and the optimiser behind its wrappers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from tnmoe.errors import InputError
from tnmoe.nn.training.hooks import AttachedHooks

Arguments = tuple[tuple, dict[str, Any]]


class StepHook(AttachedHooks):
    """A pair of functions that run before and after every step of an optimiser.

    Torch runs its own hooks once per class whose ``step`` calls its parent's ``step``. These
    functions run once per step, around the outermost call.

    Parameters
    ----------
    optimizer : Optimizer
    before : callable, optional
        Takes the arguments of ``step``, as a tuple and a dict, and returns the arguments to
        continue with.
    after : callable, optional
        Takes nothing. It does not run if the step raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[tuple, dict[str, Any]], Arguments] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._before, self._after = before, after
        # Calls of step that have begun, outermost first. Torch does not report the end of a call
        # that raised, but its frame is no longer on the stack.
        self._running: list[FrameType] = []
        super().__init__(
            optimizer.register_step_pre_hook(self._begin_call),
            optimizer.register_step_post_hook(self._end_call),
        )

    def _begin_call(self, _: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Arguments | None:
        caller = sys._getframe(1)
        self._running = [*_still_running(self._running, caller), caller]
        if len(self._running) > 1 or self._before is None:
            return None
        # The first argument is the optimiser itself.
        positional, kwargs = self._before(args[1:], kwargs)
        return (args[0], *positional), kwargs

    def _end_call(self, *_: Any) -> None:
        self._running = _still_running(self._running, sys._getframe(1))[:-1]
        if not self._running and self._after is not None:
            self._after()

    def remove(self) -> None:
        super().remove()
        self._running = []


def _still_running(frames: list[FrameType], caller: FrameType) -> list[FrameType]:
    """Return the frames that are on the stack of ``caller``, which is part of its own stack."""
    if not frames:
        return []
    stack = set()
    frame: FrameType | None = caller
    while frame is not None:
        stack.add(frame)
        frame = frame.f_back
    return [frame for frame in frames if frame in stack]


def unwrap_optimizer(optimizer: Any, advice: str = "") -> Optimizer:
    """Return the torch optimiser itself, or the optimiser inside a wrapper.

    Parameters
    ----------
    optimizer : Optimizer, or a wrapper that holds one as ``optimizer`` or ``optim``
        Accelerate's wrapper uses the first name, torch's ``PostLocalSGDOptimizer`` the second.
    advice : str
        Advice that ends the error's message.

    Raises
    ------
    InputError
        If ``optimizer`` is neither.
    """
    inner = optimizer
    while isinstance(wrapped := _wrapped_optimizer(inner), Optimizer):
        inner = wrapped
    if not _accepts_hooks(inner):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}{advice}"
        )
    return inner


def _wrapped_optimizer(optimizer: Any) -> Any:
    # An optimiser may hold some of its parameters in an "optim", as torch's ZeroRedundancyOptimizer
    # does. Then its own hooks are the right ones.
    wrapped = None if _accepts_hooks(optimizer) else getattr(optimizer, "optim", None)
    return getattr(optimizer, "optimizer", wrapped)


def _accepts_hooks(optimizer: Any) -> bool:
    # A wrapper may derive from Optimizer without calling its constructor.
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
