"""PyTorch tensors, on any device; gradients flow wherever PyTorch defines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnmoe.errors import InputError


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
        array = _plain(array)
        # What torch.func.grad and its like have wrapped only has memory outside of them.
        with torch._C._DisableFuncTorch():
            array = array.detach().cpu()
            return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    def from_numpy(self, array: np.ndarray, like: Tensor | None = None) -> Tensor:
        tensor = torch.from_numpy(np.asarray(array, order="C"))
        return tensor if like is None else tensor.to(like.device, like.dtype)

    def max_abs(self, array: Tensor) -> float:
        _plain(array)  # or an error
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
        # In memory, because what is only marked as conjugate has no .numpy().
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
        # Drawn by NumPy so that one seed gives the same numbers on every library and device.
        numbers = rng.standard_normal(shape)
        if like.is_complex():
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return self.from_numpy(numbers, like)

    def full_precision(self, like: Tensor) -> AbstractContextManager[None]:
        kind = like.device.type
        return _without_autocast(kind) if torch.compiler.is_compiling() else _full_precision(kind)

    def tracked(self, array: Tensor) -> bool:
        return _tracked(array) or _forward_mode()

    def qr(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not _tracked(matrix):
            return _qr(matrix)
        if matrix.shape[-2] > matrix.shape[-1]:
            return _QR.apply(matrix)
        # A square unitary Q is a change of basis: Q Qᴴ A = A whatever Q is, so Q is constant.
        unitary = _qr(matrix.detach())[0]
        return unitary, unitary.mH @ matrix

    def left_svd(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not _tracked(matrix):
            return _svd(matrix)[:2]
        u, s, _ = _LeftSVD.apply(matrix)
        return u[..., : s.shape[-1]].contiguous(), s

    def eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _Eigh.apply(matrix) if _tracked(matrix) else _eigh(matrix)

    def eigvalsh(self, matrix: Tensor) -> Tensor:
        if _tracked(matrix):
            return self.eigh(matrix)[0]
        return torch.linalg.eigvalsh(matrix).flip(-1)

    def triangle(self, matrix: Tensor) -> Tensor:
        if _tracked(matrix):
            return _Triangle.apply(matrix)[0]
        if not _forward_mode():
            return self.adjoint(_qr(self.adjoint(matrix), mode="r")[1])
        if not matrix.requires_grad:
            return matrix @ _qr(matrix.detach().mH)[0]  # see _Triangle
        return self.adjoint(_qr(self.adjoint(matrix))[1])


backend = TorchBackend()


@contextmanager
def _full_precision(kind: str) -> Iterator[None]:
    """A block without autocast on a kind of device, and without rough products of float32."""
    with _without_autocast(kind), _rough_products.off(), np.errstate(under="ignore"):
        yield


def _without_autocast(kind: str) -> AbstractContextManager:
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


# What may let products of float32 be rougher than float32: TF32 on a GPU, bfloat16 in oneDNN.
# Before torch 2.9 there is only the setting for all of them.
_PRODUCTS: tuple[Any, ...] = tuple(
    owner
    for owner in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(owner, "fp32_precision")
)


class _RoughProducts:
    """The settings that let products of float32 be rougher than float32.

    They belong to the process, not to a thread: the first block that needs them off turns them
    off, and the last one turns them back.
    """

    def __init__(self) -> None:
        self._lock, self._blocks = Lock(), 0
        self._common: str | None = None
        self._own: list[str] = []

    @contextmanager
    def off(self) -> Iterator[None]:
        """A block in which products of float32 have the precision of float32."""
        if not self._enter():
            yield
            return
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> bool:
        """Count a block in, unless there is nothing to turn off."""
        with self._lock:
            if not self._blocks:
                self._common = _common_precision()
                self._own = [owner.fp32_precision for owner in _PRODUCTS]
                if self._common in (None, "highest") and {*self._own} <= {"none", "ieee"}:
                    return False
                if self._common is not None:
                    torch.set_float32_matmul_precision("highest")
                for owner in _PRODUCTS:
                    owner.fp32_precision = "ieee"
            self._blocks += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            if self._common is not None:
                torch.set_float32_matmul_precision(self._common)
            for owner, before in zip(_PRODUCTS, self._own, strict=True):
                # "none" stands for what the settings above this one say; they may have said it.
                for precision in ("none", before):
                    if owner.fp32_precision != before:
                        owner.fp32_precision = precision


def _common_precision() -> str | None:
    """The setting for all devices; None where those of single devices contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_rough_products = _RoughProducts()


def _qr(matrix: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix, mode=mode)
    # On a CPU, LAPACK makes NaN of complex columns below the normal numbers of single precision.
    if matrix.dtype == torch.complex64 and matrix.device.type == "cpu":
        sound = torch.isfinite(q).all() and torch.isfinite(r).all()
        if not sound and torch.isfinite(matrix).all():
            q, r = torch.linalg.qr(matrix.to(torch.complex128), mode=mode)
    return q.to(matrix.dtype), r.to(matrix.dtype)


def _tracked(matrix: Tensor) -> bool:
    """Whether gradients are asked for in reverse mode alone, for which the functions below are."""
    return matrix.requires_grad and torch.is_grad_enabled() and not _forward_mode()


def _forward_mode() -> bool:
    """Whether derivatives are taken in forward mode, which has torch's own formulas."""
    return forward_ad._current_level >= 0


def _plain(array: Tensor) -> Tensor:
    """The tensor inside what the transformations of ``torch.func`` wrap around it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(array):
        if functorch.is_batchedtensor(array):
            raise InputError(
                "torch.func.vmap hides the numbers in a tensor, on which scales and bond "
                "dimensions depend: use a loop, or tnmoe.decompose_batch for many matrices"
            )
        array = functorch.get_unwrapped(array)
    return array


def _svd(matrix: Tensor, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """SVD with slower, safer ways behind it: QR iteration on the GPU, then float64 on the CPU."""
    try:
        return torch.linalg.svd(matrix, full_matrices=full)
    except torch.linalg.LinAlgError:
        pass
    if matrix.is_cuda:
        try:
            return torch.linalg.svd(matrix, full_matrices=full, driver="gesvd")
        except torch.linalg.LinAlgError:
            pass
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    u, s, vh = torch.linalg.svd(matrix.to("cpu", wide), full_matrices=full)
    return u.to(matrix), s.to(matrix.device, matrix.real.dtype), vh.to(matrix)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def _rotation_gradient(values: Tensor, vectors: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to a Hermitian matrix, in its own eigenbasis, from its eigenvectors.

    The reciprocals of the gaps between eigenvalues are smoothed over gaps of the order of
    rounding (Liao, Liu, Wang, Xiang, Phys. Rev. X 9, 031041 (2019), section III.A.2). Where two
    values are equal, a function of the space they span does not ask for more.
    """
    inner = vectors.mH @ grad
    gaps = values[..., None, :] - values[..., :, None]
    limits = torch.finfo(values.dtype)
    width = 16 * limits.eps * values.abs().amax(-1)[..., None, None]
    reciprocals = gaps / (gaps**2 + width**2).clamp_min(limits.tiny)
    return reciprocals * (inner - inner.mH) / 2


class _Eigh(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _eigh(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        with _full_precision(vectors.device.type):
            inner = _rotation_gradient(values, vectors, grad_vectors)
            return vectors @ (inner + torch.diag_embed(grad_values)) @ vectors.mH


class _LeftSVD(torch.autograd.Function):
    """All left singular vectors, singular values, and the right vectors that belong to them.

    The former two are those of the eigenvectors of A Aᴴ, without squaring. The right vectors have
    no gradient.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = matrix.shape[-2:]
        # The left vectors beyond the rank take part: a kept space can turn into their directions.
        u, s, vh = _svd(matrix, full=rows > columns)
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
        with _full_precision(u.device.type):
            if torch.is_grad_enabled():
                inverse = s / (s**2).clamp_min(torch.finfo(s.dtype).tiny)
                vh = _with_gradient_of(vh, inverse[..., None] * (left.mH @ matrix))
            grad = 2 * u @ _rotation_gradient(squares, u, grad_u) @ (u.mH @ matrix)
            return grad + (left * grad_s[..., None, :]) @ vh


class _QR(torch.autograd.Function):
    """QR of a tall matrix; the inverse of R in its gradient is a pseudo-inverse."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _qr(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> Tensor:
        # Walter, Lehmann, Lamour, Opt. Methods Softw. 27, 341 (2012).
        q, r = ctx.saved_tensors
        with _full_precision(q.device.type):
            inner = (grad_r @ r.mH - q.mH @ grad_q).triu()
            inner = inner + inner.triu(1).mH
            if q.is_complex():
                inner = inner - 1j * torch.diag_embed(_diagonal(inner).imag)
            return (q @ inner + grad_q) @ torch.linalg.pinv(r).mH


class _Triangle(torch.autograd.Function):
    """T and Q in A = T Qᴴ, for A wider than tall.

    Turning Q leaves T Tᴴ alone. So in a function of that, Q counts as constant within the space
    that its columns span, and only leaves this space as A does. Q has no gradient.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        q, r = _qr(matrix.mH)
        return r.mH.contiguous(), q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        matrix, triangle, q = ctx.saved_tensors
        with _full_precision(q.device.type):
            if torch.is_grad_enabled():
                full = bool((torch.linalg.matrix_rank(triangle) == triangle.shape[-1]).all())
                other = (
                    matrix.mH @ torch.linalg.pinv(triangle).mH if full else _Unknown.apply(matrix)
                )
                q = _with_gradient_of(q, other)
            return grad @ q.mH


class _Unknown(torch.autograd.Function):
    """Zero, with a gradient that nobody knows."""

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


def _with_gradient_of(array: Tensor, other: Tensor) -> Tensor:
    """An array with the derivative of another expression for it, less precise perhaps."""
    return array + (other - other.detach())


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
