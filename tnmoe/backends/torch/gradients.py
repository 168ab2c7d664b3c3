"""Autograd functions of decompositions, and checks of whether a tensor needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnmoe.backends.torch.linear_algebra import eigh, qr, svd
from tnmoe.backends.torch.precision import full_precision
from tnmoe.errors import InputError


def needs_backward(matrix: Tensor) -> bool:
    """Return whether a matrix needs gradients in reverse mode and not in forward mode."""
    return matrix.requires_grad and torch.is_grad_enabled() and not in_forward_mode()


def in_forward_mode() -> bool:
    """Return whether derivatives in forward mode are taken, which need torch's own formulas."""
    return forward_ad._current_level >= 0


def unwrapped(array: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of ``torch.func``; raise an InputError in vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(array):
        if functorch.is_batchedtensor(array):
            raise InputError(
                "torch.func.vmap hides the numbers in a tensor, on which scales and bond "
                "dimensions depend: use a loop, or tnmoe.decompose_batch for many matrices"
            )
        array = functorch.get_unwrapped(array)
    return array


class Eigh(torch.autograd.Function):
    """Eigenvalues and eigenvectors of a Hermitian matrix."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return eigh(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        with full_precision(vectors.device.type):
            inner = _rotation_gradient(values, vectors, grad_vectors)
            return vectors @ (inner + torch.diag_embed(grad_values)) @ vectors.mH


def _rotation_gradient(values: Tensor, vectors: Tensor, grad: Tensor) -> Tensor:
    """Turn a gradient for eigenvectors into one for the Hermitian matrix, in its eigenbasis.

    The formula divides by the gaps between eigenvalues; reciprocals of gaps as small as rounding
    are smoothed (Liao, Liu, Wang, Xiang, Phys. Rev. X 9, 031041 (2019), section III.A.2). Where
    two eigenvalues are equal, a function of the space that they span needs no more than that.
    """
    inner = vectors.mH @ grad
    gaps = values[..., None, :] - values[..., :, None]
    limits = torch.finfo(values.dtype)
    width = 16 * limits.eps * values.abs().amax(-1)[..., None, None]
    reciprocals = gaps / (gaps**2 + width**2).clamp_min(limits.tiny)
    return reciprocals * (inner - inner.mH) / 2


class LeftSVD(torch.autograd.Function):
    """All left singular vectors, the singular values, and their right singular vectors.

    The gradients of the first two are those of the eigendecomposition of A Aᴴ, computed without
    squaring A. The right vectors have no gradient.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = matrix.shape[-2:]
        # The gradient needs left vectors beyond the rank: a kept space can rotate towards them.
        u, s, vh = svd(matrix, full=rows > columns)
        return u, s, vh[..., : min(rows, columns), :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_s: Tensor, _: Tensor) -> Tensor:
        matrix, u, s, vh = ctx.saved_tensors
        left = u[..., : s.shape[-1]]
        squares = torch.nn.functional.pad(s**2, (0, u.shape[-1] - s.shape[-1]))
        with full_precision(u.device.type):
            if torch.is_grad_enabled():
                inverse = s / (s**2).clamp_min(torch.finfo(s.dtype).tiny)
                vh = _with_gradient_of(vh, inverse[..., None] * (left.mH @ matrix))
            grad = 2 * u @ _rotation_gradient(squares, u, grad_u) @ (u.mH @ matrix)
            return grad + (left * grad_s[..., None, :]) @ vh


class QR(torch.autograd.Function):
    """QR decomposition of a tall matrix; its gradient uses a pseudo-inverse of R."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return qr(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> Tensor:
        # Walter, Lehmann, Lamour, Opt. Methods Softw. 27, 341 (2012).
        q, r = ctx.saved_tensors
        with full_precision(q.device.type):
            inner = (grad_r @ r.mH - q.mH @ grad_q).triu()
            inner = inner + inner.triu(1).mH
            if q.is_complex():
                inner = inner - 1j * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1).imag)
            return (q @ inner + grad_q) @ torch.linalg.pinv(r).mH


class TriangularFactor(torch.autograd.Function):
    """The factors T and Q of A = T Qᴴ, for a matrix A that is wider than tall.

    Rotating Q within the space of its columns leaves T Tᴴ unchanged. For a function of T Tᴴ, Q
    therefore counts as constant within that space, and leaves it only as A does. Q has no gradient.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        q, r = qr(matrix.mH)
        return r.mH.contiguous(), q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        matrix, triangle, q = ctx.saved_tensors
        with full_precision(q.device.type):
            if torch.is_grad_enabled():
                full = bool((torch.linalg.matrix_rank(triangle) == triangle.shape[-1]).all())
                if full:
                    expression = matrix.mH @ torch.linalg.pinv(triangle).mH
                else:
                    expression = _UndefinedGradient.apply(matrix)
                q = _with_gradient_of(q, expression)
            return grad @ q.mH


class _UndefinedGradient(torch.autograd.Function):
    """Zero, with a gradient that does not exist: the backward pass raises an InputError."""

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return matrix.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise InputError(
            "second derivatives of a decomposition or rounding need unfoldings of full rank: "
            "smaller bonds, or a shape without padding"
        )


def _with_gradient_of(array: Tensor, expression: Tensor) -> Tensor:
    """Return an array with the derivative of another, perhaps less precise, expression for it."""
    return array + (expression - expression.detach())
