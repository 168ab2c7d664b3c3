"""The operations of a library that the benchmarks time, and tnmoe as such a library.

An operation that a library lacks raises :class:`Unsupported` with the reason, which the table
shows. ``array`` and ``operator`` convert arguments to the library's own types before the clock
starts; ``cores`` and ``to_numpy`` convert results back to NumPy after it stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

import tnmoe as tn

Cores = Sequence[np.ndarray]


class Limits(TypedDict, total=False):
    """The limits of a truncation; without any, nothing is truncated."""

    max_bond: int
    rtol: float


class Unsupported(Exception):  # noqa: N818 - an answer, not an error
    """The library lacks the operation."""


class Library:
    """The operations that the benchmark times; by default, a library lacks them."""

    name: str
    package: str
    # The operations in which a variant differs; the benchmark skips the rest.
    only: tuple[str, ...] | None = None

    def array(self, array: np.ndarray) -> Any:
        return array

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def synchronize(self) -> None:
        """Wait for a device; nothing to do on the CPU."""

    def operator(self, cores: Cores) -> Any:
        raise Unsupported("no operators")

    def cores(self, operator: Any, shape: tn.MPOShape) -> list[np.ndarray]:
        """Return the cores (left bond, out, in, right bond)."""
        return [
            self.to_numpy(core).reshape(core.shape[0], out, in_, core.shape[-1])
            for core, out, in_ in zip(operator.cores, shape.out_dims, shape.in_dims, strict=True)
        ]

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> Any:
        raise Unsupported("no decomposition")

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> Any:
        raise Unsupported("no sums or rounding")

    def round_product(self, a: Any, b: Any, max_bond: int) -> Any:
        raise Unsupported("no products of operators")

    def apply(self, operator: Any, x: Any) -> Any:
        """Map vectors (batch, in) to (batch, out)."""
        raise Unsupported("no products with vectors")

    def norm(self, operator: Any) -> Any:
        raise Unsupported("no norm")

    def inner(self, a: Any, b: Any) -> Any:
        raise Unsupported("no inner product")


class OnTorch(Library):
    """A library of torch tensors on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def array(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.cpu().numpy()

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Tnmoe(Library):
    name, package = "tnmoe numpy", "tnmoe"

    def operator(self, cores: Cores) -> tn.MPO:
        return tn.MPO([self.array(core) for core in cores])

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> tn.MPO:
        return tn.decompose(matrix, shape, **limits)

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> tn.MPO:
        return reduce(add, operators).compress(**limits)

    def round_product(self, a: Any, b: Any, max_bond: int) -> tn.MPO:
        return (a @ b).compress(max_bond=max_bond)

    def apply(self, operator: tn.MPO, x: Any) -> Any:
        return operator.apply(x)

    def norm(self, operator: tn.MPO) -> Any:
        return operator.norm()

    def inner(self, a: Any, b: Any) -> Any:
        return a.inner(b)


class TnmoeTorch(OnTorch, Tnmoe):
    name = "tnmoe torch"
