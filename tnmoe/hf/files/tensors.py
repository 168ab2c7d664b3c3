"""Tensors as the header of a safetensors file describes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# From safetensors' names of dtypes to torch's dtypes.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Names of the dtypes in which a model's weights are read.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorSpec:
    """The description of a tensor in a file.

    Attributes
    ----------
    dtype : str
        Safetensors' name.
    shape : tuple of int
    num_bytes : int
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe a tensor on any device, the meta device included."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.itemsize)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, as torch's."""
        return _DTYPES[self.dtype]

    @property
    def num_params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element; an element smaller than a byte counts as one."""
        return max(1, self.num_bytes // max(1, self.num_params))


@dataclass(frozen=True)
class TensorLocation:
    """The place of a tensor's numbers.

    Attributes
    ----------
    path : Path
        The file.
    offset : int
        Bytes before the first number.
    """

    path: Path
    offset: int


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Add up the bytes of tensors."""
    return sum(spec.num_bytes for spec in specs)


def total_params(specs: Iterable[TensorSpec]) -> int:
    """Add up the elements of tensors."""
    return sum(spec.num_params for spec in specs)
