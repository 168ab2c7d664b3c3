"""Linear modules that hold a matrix which all experts share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError


def as_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear module of a matrix and a bias, in the same memory.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
    bias : Tensor of shape (out,), optional
    """
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def size_of_linear(module: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of a linear module's matrix.

    Raises
    ------
    InputError
        If the module is not linear.
    """
    if is_transposed(module):
        return tuple(weight_of_linear(module).shape)  # type: ignore[return-value]
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise InputError(
            "a module that experts share must be linear, with in_features and out_features or "
            f"transformers' Conv1D; got {type(module).__name__}"
        )
    rows, columns = sizes
    return int(rows or 0), int(columns or 0)


def bias_of_linear(module: nn.Module) -> Tensor | None:
    """Return what a linear module adds to its product, shape (out,)."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def weight_of_linear(module: nn.Module) -> Tensor:
    """Return a linear module's matrix, (out, in): a view where the module stores it as floats.

    Other modules, quantised ones or those with adapters for instance, are applied to the identity
    matrix.
    """
    weight: Any = getattr(module, "weight", None)
    if is_transposed(module):
        return weight.T
    if type(module) is nn.Linear:
        return weight
    size = size_of_linear(module)
    dtype, device = dtype_of_linear(module), next(module.parameters()).device
    product = module(torch.eye(size[1], dtype=dtype, device=device))
    bias = bias_of_linear(module)
    return (product if bias is None else product - bias).T


def dtype_of_linear(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a linear module computes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, which stores its matrix as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
