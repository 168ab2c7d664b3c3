"""Linear modules: their matrices and biases, and calls in any precision."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.stored_cores import part_of_larger
from tnmoe.nn.transforms import autocast_dtype, is_offloaded


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
            "the module must be linear, with in_features and out_features or transformers' Conv1D; "
            f"got {type(module).__name__}"
        )
    rows, columns = sizes
    return int(rows or 0), int(columns or 0)


def call_linear(module: nn.Module, rows: Tensor) -> Tensor:
    """Call a linear module, which may compute in another dtype than its surroundings."""
    if getattr(module, "_casts_inputs", False):
        return module(rows)
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or not _computes(weight)  # quantised modules cast by themselves
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
    """Return a linear module's matrix, (out, in): a view where :func:`has_matrix`.

    Other modules are applied to the identity matrix.
    """
    if has_matrix(module):
        weight: Any = module.weight
        return weight.T if is_transposed(module) else weight
    columns = size_of_linear(module)[1]
    place: dict[str, Any] = {"dtype": dtype_of_linear(module), "device": device_of_linear(module)}
    identity = torch.eye(columns, **place)
    products = module(F.pad(identity, (0, 0, 0, 1)))  # of the row of zeros: the bias
    return (products[:-1] - products[-1:]).T


def has_matrix(module: nn.Module) -> bool:
    """Return whether a linear module holds its matrix as floats, in memory, and nothing else.

    Quantised modules, modules with adapters and offloaded ones do not.
    """
    is_known = type(module) is nn.Linear or is_transposed(module)
    return is_known and not is_offloaded(module) and holds_floats(module.weight)


def holds_floats(weight: Any) -> bool:
    """Return whether a weight is a tensor of floats, and not of a quantizer's own class."""
    package = type(weight).__module__.partition(".")[0]
    return package == "torch" and (_computes(weight) or weight.is_complex())


def check_has_matrix(module: nn.Module) -> None:
    """Raise an InputError unless a linear module holds its matrix; see :func:`has_matrix`."""
    if not has_matrix(module):
        raise InputError(f"only a module that holds a matrix of floats is drawn anew, got {module}")


@torch.no_grad()
def reset_linear(module: nn.Module) -> None:
    """Draw the numbers of a linear module anew, with the variance of ``torch.nn.Linear``'s.

    Raises
    ------
    InputError
        If the module does not hold its matrix as floats.
    """
    check_has_matrix(module)
    weight = weight_of_linear(module)
    weight.uniform_(-1 / sqrt(weight.shape[1]), 1 / sqrt(weight.shape[1]))
    reset_bias(module)


@torch.no_grad()
def reset_bias(module: nn.Module) -> None:
    """Draw the bias of a linear module anew, if it has one."""
    if (bias := bias_of_linear(module)) is not None:
        bound = 1 / sqrt(size_of_linear(module)[1])
        bias.uniform_(-bound, bound)


def dtype_of_linear(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a linear module computes."""
    for tensor in _tensors_of(module):
        if _computes(tensor):
            return tensor.dtype
    return torch.get_default_dtype()


def device_of_linear(module: nn.Module) -> torch.device:
    """Return the device of a linear module's inputs."""
    # A hook moves the rows to where an offloaded module computes.
    return torch.device("cpu") if is_offloaded(module) else next(_tensors_of(module)).device


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, which stores its matrix as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _computes(tensor: Tensor) -> bool:
    """Return whether a module computes in a tensor's dtype: 8 bits only store numbers."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
