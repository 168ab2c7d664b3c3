"""Under what code runs: transformations, tracing, a backward pass; and what it may do then."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` is under way.

    Code may then neither depend on the numbers in a tensor nor change a buffer.
    """
    # Tracing cannot look inside, and compiles the transformed function as it is.
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


def needs_native_operators() -> bool:
    """Whether code is differentiated or vectorised in a way that only torch's own operators know.

    The transformations of ``torch.func``, and forward-mode differentiation without them.
    """
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or forward_ad._current_level >= 0


def values_are_readable(tensor: Tensor) -> bool:
    """Whether code may depend on the numbers in a tensor, and need not wait for them."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return tensor.device.type == "cpu" and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in a tensor: ``meta`` and ``FakeTensorMode`` have sizes alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def in_backward() -> bool:
    """Whether this is a backward pass, in which activation checkpointing runs layers again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def is_under_dispatch_mode() -> bool:
    """Whether a mode looks at every operator: one that counts operations, or computes nothing."""
    return torch._C._len_torch_dispatch_stack() > 0


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast takes products in where a tensor is; None where it is off."""
    kind = tensor.device.type
    # The meta device has none.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def caller_context() -> Context:
    """The context of the code that runs, and in a backward pass of who called ``backward``.

    Torch runs the backward passes of accelerators in threads of its own.
    """
    if in_backward() and torch._C._is_key_in_tls("context"):
        return torch._C._get_obj_in_tls("context")
    return copy_context()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which tensors of a device are computed with in the precision that they have."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
