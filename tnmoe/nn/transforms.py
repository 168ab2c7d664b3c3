"""The state of torch around the running code: transformations, tracing, a backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tnmoe.backends.torch.gradients import in_forward_mode


def is_transformed() -> bool:
    """Return whether a transformation of ``torch.func`` is running.

    Code must then neither depend on the numbers in a tensor nor change a buffer.
    """
    # The tracer cannot see this state, and compiles the transformed function as it is.
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


def needs_native_operators() -> bool:
    """Return whether code is transformed in a way that only torch's own operators support.

    These are the transformations of ``torch.func``, and forward-mode differentiation without them.
    """
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or in_forward_mode()


def values_are_readable(tensor: Tensor) -> bool:
    """Return whether code may read the numbers in a tensor without synchronising with a device."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return tensor.device.type == "cpu" and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers and not only sizes, as on ``meta`` or when faked."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate loads a module's own tensors for every call of the module."""
    hook = vars(module).get("_hf_hook")
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def in_backward() -> bool:
    """Return whether a backward pass is running.

    Activation checkpointing runs layers again in it.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def is_under_dispatch_mode() -> bool:
    """Return whether a mode intercepts every operator, to count operations for instance."""
    return torch._C._len_torch_dispatch_stack() > 0


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor, without a call of torch if it has the dtype already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on a tensor's device, or None where autocast is off."""
    kind = tensor.device.type
    # The meta device has no autocast.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def autocast_state(device: torch.device) -> tuple[str, bool, torch.dtype] | None:
    """Return what :func:`autocast_as` takes; None for a device without autocast."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return None
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def autocast_as(state: tuple[str, bool, torch.dtype] | None) -> AbstractContextManager:
    """Return a block under the autocast that was on when :func:`autocast_state` was called."""
    if state is None:
        return nullcontext()
    kind, enabled, dtype = state
    return torch.autocast(kind, dtype=dtype, enabled=enabled)


def caller_context() -> Context:
    """Return the context of the running code, or in a backward pass that of its caller.

    Torch runs the backward passes of accelerators in its own threads.
    """
    if in_backward() and torch._C._is_key_in_tls("context"):
        return torch._C._get_obj_in_tls("context")
    return copy_context()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a block in which operations on a device keep the dtype of their tensors."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
