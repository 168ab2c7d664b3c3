"""The backend of PyTorch tensors on any device, with gradients through every operation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from tnmoe.backends.torch import gradients, linear_algebra
from tnmoe.backends.torch.precision import full_precision, without_autocast


class TorchBackend:
    """The protocol of :mod:`tnmoe.backends.protocol` in PyTorch."""

    name = "torch"

    def __repr__(self) -> str:
        return f"<backend of {self.name}>"

    def dtype_name(self, array: Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")

    def astype(self, array: Tensor, dtype: str) -> Tensor:
        return array.to(getattr(torch, dtype))

    def to_numpy(self, array: Tensor) -> np.ndarray:
        array = gradients.unwrapped(array)
        # A tensor that torch.func.grad or a similar transformation wrapped has no memory inside it.
        with torch._C._DisableFuncTorch():
            # torch may only mark a tensor as conjugate or negative, which NumPy would not see.
            array = array.detach().cpu().resolve_conj().resolve_neg()
            return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    def from_numpy(self, array: np.ndarray, like: Tensor | None = None) -> Tensor:
        tensor = torch.from_numpy(np.asarray(array, order="C"))
        return tensor if like is None else tensor.to(like.device, like.dtype)

    def max_abs(self, array: Tensor) -> float:
        gradients.unwrapped(array)  # raises where torch.func.vmap hides the numbers
        if array.is_complex():
            array = torch.view_as_real(array.detach().resolve_conj())
        if not array.numel():
            return 0.0
        least, most = torch.aminmax(array.detach())
        return float(torch.maximum(most, -least))

    def norm(self, array: Tensor) -> Tensor:
        scale = self.max_abs(array) or 1.0
        wide = torch.complex128 if array.is_complex() else torch.float64
        norm = torch.linalg.vector_norm(array / scale, dtype=wide) * scale
        return norm.to(array.real.dtype)

    def conj(self, array: Tensor) -> Tensor:
        # In memory: a tensor that torch only marks as conjugate has no .numpy().
        return array.conj_physical() if array.is_complex() else array

    def permute(self, array: Tensor, axes: Sequence[int]) -> Tensor:
        return array.permute(tuple(axes))

    def transpose(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(-1, -2)

    def adjoint(self, matrix: Tensor) -> Tensor:
        return matrix.mH

    def trace(self, array: Tensor, first: int, second: int) -> Tensor:
        return array.diagonal(dim1=first, dim2=second).sum(-1)

    def pad(self, matrix: Tensor, rows: int, columns: int) -> Tensor:
        return torch.nn.functional.pad(
            matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2])
        )

    def stack(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(arrays))

    def concatenate(self, arrays: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(arrays), axis)

    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)

    def eye(self, size: int, like: Tensor) -> Tensor:
        return torch.eye(size, dtype=like.dtype, device=like.device)

    def normal(self, shape: Sequence[int], rng: np.random.Generator, like: Tensor) -> Tensor:
        # NumPy draws, so that a seed gives the same numbers in every library and on every device.
        numbers = rng.standard_normal(shape)
        if like.is_complex():
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return self.from_numpy(numbers, like)

    def on_device(self, like: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def full_precision(self, like: Tensor) -> AbstractContextManager[None]:
        device_type = like.device.type
        if torch.compiler.is_compiling():
            return without_autocast(device_type)
        return full_precision(device_type)

    def tracked(self, array: Tensor) -> bool:
        return gradients.needs_backward(array) or gradients.in_forward_mode()

    def has_numbers(self, array: Tensor) -> bool:
        # torch.func.vmap alone hides numbers, and is refused: see gradients.unwrapped.
        return True

    def qr(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not gradients.needs_backward(matrix):
            return linear_algebra.qr(matrix)
        if matrix.shape[-2] > matrix.shape[-1]:
            return gradients.QR.apply(matrix)
        # A square unitary Q is a change of basis: Q Qᴴ A = A for every Q, so Q may be constant.
        unitary = linear_algebra.qr(matrix.detach())[0]
        return unitary, unitary.mH @ matrix

    def left_svd(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not gradients.needs_backward(matrix):
            return linear_algebra.svd(matrix)[:2]
        u, s, _ = gradients.LeftSVD.apply(matrix)
        return u[..., : s.shape[-1]].contiguous(), s

    def eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if gradients.needs_backward(matrix):
            return gradients.Eigh.apply(matrix)
        return linear_algebra.eigh(matrix)

    def eigvalsh(self, matrix: Tensor) -> Tensor:
        if gradients.needs_backward(matrix):
            return self.eigh(matrix)[0]
        return torch.linalg.eigvalsh(matrix).flip(-1)

    def cholesky(self, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
        triangle, failure = torch.linalg.cholesky_ex(matrix)
        if failure:
            return None
        eye = self.eye(triangle.shape[0], like=matrix)
        return triangle, torch.linalg.solve_triangular(triangle, eye, upper=False)

    def triangular_factor(self, matrix: Tensor) -> Tensor:
        if gradients.needs_backward(matrix):
            return gradients.TriangularFactor.apply(matrix)[0]
        if not gradients.in_forward_mode():
            return self.adjoint(linear_algebra.qr(self.adjoint(matrix), mode="r")[1])
        if not matrix.requires_grad:
            # Q counts as constant: see gradients.TriangularFactor.
            return matrix @ linear_algebra.qr(matrix.detach().mH)[0]
        return self.adjoint(linear_algebra.qr(self.adjoint(matrix))[1])


backend = TorchBackend()
