"""Hooks that stay attached until they are removed, and hooks on gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Removable(Protocol):
    """Anything that ``remove`` detaches, such as a handle of torch's hooks."""

    def remove(self) -> None: ...


class AttachedHooks:
    """Hooks that stay attached until ``remove`` is called or a ``with`` block ends.

    Parameters
    ----------
    handles : Removable
        Handles of the hooks.
    """

    def __init__(self, *handles: Removable) -> None:
        self._handles: list[Removable] = list(handles)

    def remove(self) -> None:
        """Detach all hooks: from now on training runs without them."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hook_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """Register a function that receives a parameter's gradient before it is accumulated.

    A frozen parameter takes the hook as well, in case it is unfrozen later.
    """
    return _register_unfrozen(parameter, parameter.register_hook, hook)


def hook_accumulated_gradient(
    parameter: nn.Parameter, hook: Callable[[Tensor], Any]
) -> RemovableHandle:
    """Register a function that receives a parameter after ``grad`` has accumulated a gradient.

    A frozen parameter takes the hook as well, in case it is unfrozen later.
    """
    return _register_unfrozen(parameter, parameter.register_post_accumulate_grad_hook, hook)


def _register_unfrozen(
    parameter: nn.Parameter, register: Callable[..., RemovableHandle], hook: Callable[[Tensor], Any]
) -> RemovableHandle:
    # Torch refuses hooks on tensors that require no gradient.
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        return register(hook)
    finally:
        parameter.requires_grad_(is_trained)
