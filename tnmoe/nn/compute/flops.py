"""How many operations tnmoe's operators take, for ``torch.utils.flop_counter.FlopCounterMode``.

Without these formulas it would count nothing there. As for torch's own products, a multiply-add
counts as two, and what is no product as none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import tnmoe.nn.compute.cache  # noqa: F401 - its operator is counted here
from tnmoe.nn.compute.grouped import blocks_of
from tnmoe.nn.compute.rebuilt import Legs
from tnmoe.nn.transforms import has_values

_OPERATORS = torch.ops.tnmoe


@register_flop_formula(_OPERATORS.grouped_linear, get_raw=True)
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, **_: Any) -> int:
    columns = prod(rows.shape[2:])
    return 2 * _rows_of(rows, offsets) * columns * weight.shape[1] * weight.shape[2]


@register_flop_formula(_OPERATORS.grouped_outer, get_raw=True)
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, **_: Any) -> int:
    columns = prod(left.shape[2:])
    return 2 * _rows_of(left, offsets) * columns * left.shape[1] * right.shape[1]


@register_flop_formula(_OPERATORS.rebuilt_linear, get_raw=True)
def _rebuilt_linear(
    rows: Tensor,
    center: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    legs: Sequence[int],
    **_: Any,
) -> int:
    half, whole, product = _parts(rows, center, left, offsets, legs)
    return half + whole + product


@register_flop_formula(_OPERATORS.rebuilt_linear_backward, get_raw=True)
def _rebuilt_linear_backward(
    grad: Tensor,
    rows: Tensor,
    center: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    legs: Sequence[int],
    wants_rows: bool,
    wants_cores: bool,
    **_: Any,
) -> int:
    half, whole, product = _parts(rows, center, left, offsets, legs)
    # Halves are built again, and matrices where rows have gradients; every product that cores are
    # a factor of has two gradients.
    of_rows = (whole + product) * wants_rows
    of_cores = (product + 2 * whole + 2 * half) * wants_cores
    return half + of_rows + of_cores


@register_flop_formula(_OPERATORS.cached_linear, get_raw=True)
def _cached_linear(
    rows: Tensor,
    offsets: Tensor,
    center: Tensor,
    aux: Sequence[Tensor],
    numbers: Sequence[int],
    **_: Any,
) -> int:
    return 2 * _rows_of(rows, offsets) * rows.shape[1] * numbers[6]


def _parts(
    rows: Tensor, center: Tensor, left: Tensor, offsets: Tensor, legs: Sequence[int]
) -> tuple[int, int, int]:
    """Operations of all halves, of the matrices made of them, and of the product with rows."""
    of = Legs(tuple(legs[:3]), tuple(legs[3:]))  # type: ignore[arg-type]
    experts = len(left)
    if offsets.device.type == "cpu" and _has_numbers(offsets):
        # Nothing is built there for experts without rows.
        experts = len(list(blocks_of(offsets)))
    entries = of.out_features * of.in_features
    half = experts * left.shape[1] * center.numel()
    whole = experts * entries * center.shape[-1]
    return 2 * half, 2 * whole, 2 * _rows_of(rows, offsets) * entries


def _rows_of(rows: Tensor, offsets: Tensor) -> int:
    """How many rows have an expert; all of them where that cannot be known."""
    return int(offsets[-1]) if _has_numbers(offsets) else len(rows)


def _has_numbers(offsets: Tensor) -> bool:
    return has_values(offsets) and len(offsets) > 0
