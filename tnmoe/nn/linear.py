"""Linear modules that hold a matrix which all experts share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.stored_cores import part_of_larger
from tnmoe.nn.transforms import autocast_dtype


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


def call_linear(module: nn.Module, rows: Tensor) -> Tensor:
    """Call a linear module, which may compute in another dtype than its surroundings."""
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()  # quantised modules cast by themselves
        or weight.dtype == rows.dtype
        or autocast_dtype(rows) is not None
    ):
        return module(rows)
    return module(rows.to(weight.dtype)).to(rows.dtype)


def bias_of_linear(module: nn.Module) -> Tensor | None:
    """Return what a linear module adds to its product, shape (out,)."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def parameters_of_linear(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a linear module makes its matrix of: all but its bias.

    Raises
    ------
    InputError
        If FSDP has made the matrix a part of a larger parameter.
    """
    for part in module.modules():
        # FSDP then leaves a view in place of the parameter.
        if vars(part).get("_is_fsdp_managed_module") and isinstance(
            vars(part).get("weight"), Tensor
        ):
            raise part_of_larger("the matrix of a linear module")
    bias = bias_of_linear(module)
    return [parameter for parameter in module.parameters() if parameter is not bias]


def tie_linear(first: nn.Module, other: nn.Module) -> None:
    """Let a linear module use another one's parameters, except its own bias.

    Parameters
    ----------
    first, other : Module
        Of the same kind, see :func:`check_same_linear`; ``other`` is changed.
    """
    for name, parameter in _named_without_bias(first).items():
        holder, _, last = name.rpartition(".")
        other.get_submodule(holder).register_parameter(last, parameter)


def check_same_linear(name: str, first: nn.Module, other: nn.Module) -> None:
    """Raise an InputError unless two linear modules have parameters of the same names and shapes.

    Parameters
    ----------
    name : str
        Name of the modules in the error.
    first, other : Module
    """
    sizes = [
        {key: tuple(each.shape) for key, each in _named_without_bias(module).items()}
        for module in (first, other)
    ]
    if type(first) is not type(other) or sizes[0] != sizes[1]:
        raise InputError(f"{name} is not alike in all layers: {first} and {other}")


def _named_without_bias(module: nn.Module) -> dict[str, nn.Parameter]:
    bias = bias_of_linear(module)
    return {name: each for name, each in module.named_parameters() if each is not bias}


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
