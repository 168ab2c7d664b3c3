"""Under what code runs: transformations, tracing, a backward pass; and what it may do then."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` is under way.

    Code may then neither depend on the numbers in a tensor nor change a buffer.
    """
    # Tracing cannot look inside, and compiles the transformed function as it is.
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


def may_look(tensor: Tensor) -> bool:
    """Whether code may depend on the numbers in a tensor, and need not wait for them."""
    return (
        tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()
    )


def in_backward() -> bool:
    """Whether this is a backward pass, in which activation checkpointing runs layers again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which tensors of a device are computed with in the precision that they have."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
