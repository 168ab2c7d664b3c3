"""What transforms a function while it runs, and what code may not do meanwhile."""

from __future__ import annotations

import torch


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` is under way.

    Code may then neither depend on the numbers in a tensor nor change a buffer.
    """
    # Tracing cannot look inside, and compiles the transformed function as it is.
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )
