"""Sums of half-precision numbers, made in float32.

A sum in half precision stops growing when a term is below its last digit: that of 65,536 ones is
256 in bfloat16 and 2,048 in float16. Torch's own products and sums add up in float32 and round
once. This module adds up the results of several of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnmoe.nn.transforms import needs_native_operators


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype is a half precision, in which sums must not be made."""
    return dtype in (torch.bfloat16, torch.float16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to sum numbers of a dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to ``sums``, which has the :func:`sum_dtype` of the factors.

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


def cast_for_reuse(tensor: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Cast a tensor for several uses, and sum their gradients in float32 at least.

    Autograd sums the gradients of a tensor in the tensor's own dtype.

    Parameters
    ----------
    tensor : Tensor
    dtype : torch.dtype
        Dtype of the cast tensor.

    Returns
    -------
    callable
        Returns the cast tensor; call it once per use.

    Examples
    --------
    >>> core = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    >>> use = cast_for_reuse(core, torch.bfloat16)
    >>> sum(use().sum().float() for _ in range(300)).backward()
    >>> core.grad  # a sum in bfloat16 would stop at 256
    tensor([300., 300., 300.], dtype=torch.bfloat16)
    """
    if not is_half(dtype):
        cast = tensor.to(dtype)
        return lambda: cast
    wide = tensor.to(sum_dtype(tensor.dtype))
    if needs_native_operators():
        return lambda: wide.to(dtype)
    narrow = tensor.detach().to(dtype)
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return lambda: narrow
    return lambda: _Narrowed.apply(wide, narrow)


class _Narrowed(torch.autograd.Function):
    """``wide.to(narrow.dtype)`` without a copy per use: ``narrow`` holds the result already."""

    @staticmethod
    def forward(ctx, wide, narrow):  # type: ignore[no-untyped-def]
        ctx.dtype = wide.dtype
        return narrow.view_as(narrow)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.to(ctx.dtype), None
