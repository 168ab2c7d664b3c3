"""Sums of half-precision numbers, made in float32.

A sum in half precision stops growing when a term is below its last digit: of 65,536 ones it has
256 in bfloat16 and 2,048 in float16. Torch's own products and sums add up in float32 and round
once. What is left to do is here: sums of the results of several of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnmoe.nn.transforms import needs_native_operators


def is_half(dtype: torch.dtype) -> bool:
    """Whether sums are to be made in another dtype."""
    return dtype in (torch.bfloat16, torch.float16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add up numbers of a dtype in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to ``sums``, which is in the :func:`sum_dtype` of theirs.

    Parameters
    ----------
    sums : Tensor, shape (m, n) or (b, m, n)
    left : Tensor, shape (m, k) or (b, m, k)
    right : Tensor, shape (k, n) or (b, k, n)
    """
    if sums.dtype != left.dtype:
        sums += left @ right
    elif sums.ndim == 2:
        sums.addmm_(left, right)
    else:
        sums.baddbmm_(left, right)


def reused(tensor: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A tensor in a dtype, for several uses whose gradients add up in float32 at least.

    Autograd adds up gradients in the dtype of what was used.

    Parameters
    ----------
    tensor : Tensor
    dtype : torch.dtype
        That it is used in.

    Returns
    -------
    callable
        Gives the tensor for one use.

    Examples
    --------
    >>> core = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    >>> use = reused(core, torch.bfloat16)
    >>> sum(use().sum().float() for _ in range(300)).backward()
    >>> core.grad  # 256 if they were added up in bfloat16
    tensor([300., 300., 300.], dtype=torch.bfloat16)
    """
    if not is_half(dtype):
        once = tensor.to(dtype)
        return lambda: once
    wide = tensor.to(sum_dtype(tensor.dtype))
    if needs_native_operators():
        return lambda: wide.to(dtype)
    narrow = tensor.detach().to(dtype)
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return lambda: narrow
    return lambda: _Narrowed.apply(wide, narrow)


class _Narrowed(torch.autograd.Function):
    """``wide.to(narrow.dtype)``, without a copy for every use: ``narrow`` is that already."""

    @staticmethod
    def forward(ctx, wide, narrow):  # type: ignore[no-untyped-def]
        ctx.dtype = wide.dtype
        return narrow.view_as(narrow)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.to(ctx.dtype), None
