"""Sums over ranks that have the same tokens: of outputs, and backward of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup


def sum_outputs(outputs: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks, each of which goes on with it and gets its whole gradient."""
    return _OutputSum.apply(group, outputs)


def sum_gradients(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the same numbers, whose gradients are sums over ranks.

    One collective sums the gradients of all tensors of a dtype.

    Parameters
    ----------
    tensors : sequence of Tensor
        Equal on all ranks.
    group : ProcessGroup
    """
    found = list(tensors)
    trained = [number for number, each in enumerate(found) if each.requires_grad]
    if trained and torch.is_grad_enabled():
        summed = _GradientSum.apply(group, *(found[number] for number in trained))
        for number, each in zip(trained, summed, strict=True):
            found[number] = each
    return found


class GatheredLinear(nn.Module):
    """A linear module of whose rows each rank has a block: every rank gets all outputs.

    Parameters
    ----------
    out_features, in_features : int
        Size of the matrix of all ranks.
    group : ProcessGroup

    Attributes
    ----------
    weight : Tensor, shape (out / ranks, in)
    bias : Tensor of shape (out / ranks,), or None
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, group: ProcessGroup) -> None:
        super().__init__()
        self.out_features, self.in_features, self._group = out_features, in_features, group
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, rows: Tensor) -> Tensor:
        """Multiply rows that all ranks have: (T, in) → (T, out)."""
        return _Gathered.apply(self._group, F.linear(rows, self.weight, self.bias))


class _OutputSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, outputs: Tensor) -> Tensor:
        total = outputs.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient


class _GradientSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # A tensor without influence gets zeros from torch, so all ranks sum the same sizes.
        found = list(gradients)
        for dtype in dict.fromkeys(each.dtype for each in gradients):
            places = [place for place, each in enumerate(gradients) if each.dtype == dtype]
            parts = [gradients[place] for place in places]
            total = torch.cat([part.reshape(-1) for part in parts])
            distributed.all_reduce(total, group=ctx.group)
            sums = total.split([part.numel() for part in parts])
            for place, part, each in zip(places, parts, sums, strict=True):
                found[place] = each.view(part.shape)
        return None, *found


class _Gathered(torch.autograd.Function):
    """Put the columns of all ranks side by side; ranks need not have the same gradients of them."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, rows: Tensor) -> Tensor:
        ctx.group = group
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        distributed.all_gather(parts, rows, group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        parts = [part.contiguous() for part in gradient.chunk(ctx.group.size(), dim=1)]
        own = torch.empty_like(parts[0])
        distributed.reduce_scatter(own, parts, group=ctx.group)
        return None, own
