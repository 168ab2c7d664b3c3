"""Operation counts of tnmoe's operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Without these formulas the counter would ignore these operators. As for torch's own products, a
multiply-add counts as two operations, and only products count.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import tnmoe.nn.compute.routes  # noqa: F401 - registers the operators
from tnmoe.nn.compute.cores import Legs
from tnmoe.nn.compute.low_rank import inner_sizes
from tnmoe.nn.compute.slots import blocks_of
from tnmoe.nn.transforms import has_values

_OPERATORS = torch.ops.tnmoe


@register_flop_formula(_OPERATORS.grouped_linear, get_raw=True)
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, **_: Any) -> int:
    columns = prod(rows.shape[2:])
    return 2 * _count_rows(rows, offsets) * columns * weight.shape[1] * weight.shape[2]


@register_flop_formula(_OPERATORS.grouped_outer, get_raw=True)
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, **_: Any) -> int:
    columns = prod(left.shape[2:])
    return 2 * _count_rows(left, offsets) * columns * left.shape[1] * right.shape[1]


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
    return sum(_parts(rows, center, left, offsets, legs))


@register_flop_formula(_OPERATORS.rebuilt_linear_backward, get_raw=True)
def _rebuilt_linear_backward(
    grad: Tensor,
    rows: Tensor,
    factors: Sequence[Tensor],
    offsets: Tensor,
    legs: Sequence[int],
    needs: Sequence[bool],
    **_: Any,
) -> int:
    center, left, _right = factors
    needs_rows, needs_factors = needs
    products, matrices, linear = _parts(rows, center, left, offsets, legs)
    # Left products are built again, and matrices where rows have gradients. A product of two
    # factors that have gradients takes two in the backward.
    grad_rows = (matrices + linear) * needs_rows
    grad_factors = (linear + 2 * matrices + 2 * products) * needs_factors
    return products + grad_rows + grad_factors


@register_flop_formula(_OPERATORS.cached_linear, get_raw=True)
def _cached_linear(
    rows: Tensor, stored: Sequence[Tensor], offsets: Tensor, numbers: Sequence[int], **_: Any
) -> int:
    return 2 * _count_rows(rows, offsets) * rows.shape[1] * numbers[1]


@register_flop_formula(_OPERATORS.low_rank_linear, get_raw=True)
def _low_rank_linear(
    rows: Tensor,
    outer: Tensor,
    inner: Tensor,
    columns: Tensor,
    offsets: Tensor,
    ranks: Sequence[int],
    **_: Any,
) -> int:
    return sum(_low_rank_parts(rows, outer, offsets, ranks))


@register_flop_formula(_OPERATORS.low_rank_linear_backward, get_raw=True)
def _low_rank_linear_backward(
    grad: Tensor,
    rows: Tensor,
    tensors: Sequence[Tensor],
    offsets: Tensor,
    ranks: Sequence[int],
    **_: Any,
) -> int:
    of_outer, of_inner = _low_rank_parts(rows, tensors[0], offsets, ranks)
    # The product with the inner factor is made again.
    return 2 * of_outer + 3 * of_inner


def _low_rank_parts(
    rows: Tensor, outer: Tensor, offsets: Tensor, ranks: Sequence[int]
) -> tuple[int, int]:
    """Count the operations of rows times the outer factors, and times the inner ones."""
    if _has_numbers(offsets):
        counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    else:
        counts = [len(rows) / len(ranks)] * len(ranks)
    products = [rank * outer.shape[1] for rank in ranks], inner_sizes(ranks, rows.shape[1])
    of_outer, of_inner = (
        round(sum(2 * count * size for count, size in zip(counts, sizes, strict=True)))
        for sizes in products
    )
    return of_outer, of_inner


def _parts(
    rows: Tensor, center: Tensor, left: Tensor, offsets: Tensor, numbers: Sequence[int]
) -> tuple[int, int, int]:
    """Count the operations of left products, of matrices from them, and of rows times these."""
    legs, experts = Legs.from_numbers(numbers), len(left)
    if offsets.device.type == "cpu" and _has_numbers(offsets):
        # A CPU builds nothing for experts without rows.
        experts = len(list(blocks_of(offsets)))
    entries = legs.out_features * legs.in_features
    products = experts * left.shape[1] * center.numel()
    matrices = experts * entries * center.shape[-1]
    return 2 * products, 2 * matrices, 2 * _count_rows(rows, offsets) * entries


def _count_rows(rows: Tensor, offsets: Tensor) -> int:
    """Count the rows that have an expert, or all rows where ``offsets`` has no numbers."""
    return int(offsets[-1]) if _has_numbers(offsets) else len(rows)


def _has_numbers(offsets: Tensor) -> bool:
    return has_values(offsets) and len(offsets) > 0
