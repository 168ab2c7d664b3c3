"""Decompositions of JAX with derivatives that stay finite, in forward and in reverse mode.

Each is a ``custom_jvp``: JAX transposes the rule of the forward mode to find the reverse mode, and
differentiates it again for second derivatives. The rules are those of the torch backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def eigh(matrix: jax.Array) -> Pair:
    """Return the eigenvalues of a Hermitian matrix, largest first, and its eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[..., ::-1], vectors[..., ::-1]


@eigh.defjvp
def _eigh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Pair, Pair]:
    values, vectors = eigh(*primals)
    (change,) = tangents
    inner = adjoint(vectors) @ ((change + adjoint(change)) / 2) @ vectors
    rotated = vectors @ (_smooth_reciprocals(values) * inner)
    return (values, vectors), (_diagonal(inner).real, rotated)


def _smooth_reciprocals(values: jax.Array) -> jax.Array:
    """Return 1 / (λⱼ − λᵢ) for eigenvalues, smoothed where the gap is as small as rounding.

    Liao, Liu, Wang, Xiang, Phys. Rev. X 9, 031041 (2019), section III.A.2. Where two eigenvalues
    are equal, a function of the space that they span needs no more than that.
    """
    gaps = values[..., None, :] - values[..., :, None]
    limits = jnp.finfo(values.dtype)
    width = 16 * limits.eps * jnp.abs(values).max(-1)[..., None, None]
    return gaps / (gaps**2 + width**2).clip(limits.tiny)


@jax.custom_jvp
def left_svd(matrix: jax.Array) -> Pair:
    """Return all left singular vectors and the singular values, largest first.

    The derivatives are those of the eigendecomposition of A Aᴴ, computed without squaring A. They
    need the vectors beyond the rank: a space that is kept can rotate towards these.
    """
    return svd(matrix)[:2]


@left_svd.defjvp
def _left_svd_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Pair, Pair]:
    (matrix,), (change,) = primals, tangents
    u, s = left_svd(matrix)
    count, limits = s.shape[-1], jnp.finfo(s.dtype)
    largest = s[..., :1, None]
    # Squares of numbers divided by the largest neither over- nor underflow.
    unit = lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    squares = (s / unit[..., 0]) ** 2
    inverse = s / unit[..., 0] / squares.clip(limits.tiny)
    left = u[..., :count]
    right = adjoint(svd(lax.stop_gradient(matrix))[2])
    right = _with_derivative_of(right, adjoint(matrix / unit) @ left * inverse[..., None, :])
    moved = adjoint(u) @ change
    squares = jnp.pad(squares, [(0, 0)] * (s.ndim - 1) + [(0, u.shape[-1] - count)])
    inner = moved @ (adjoint(matrix / unit) @ u) / unit
    rotated = u @ (_smooth_reciprocals(squares) * (inner + adjoint(inner)))
    return (u, s), (rotated, _diagonal(moved[..., :count, :] @ right).real)


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return all left singular vectors, the singular values, and their right singular vectors."""
    rows, columns = matrix.shape[-2:]
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=rows > columns)
    if not isinstance(matrix, jax.core.Tracer) and bool(jnp.isnan(s).any()):
        # Where LAPACK's divide and conquer does not converge, JAX returns NaN.
        u, s, vh = lax.linalg.svd(
            matrix, full_matrices=rows > columns, algorithm=lax.linalg.SvdAlgorithm.QR
        )
    return u, s, vh[..., : min(rows, columns), :]


@jax.custom_jvp
def tall_qr(matrix: jax.Array) -> Pair:
    """Return the reduced QR decomposition of a matrix with more rows than columns."""
    q, r = jnp.linalg.qr(matrix)
    return q, r


@tall_qr.defjvp
def _tall_qr_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Pair, Pair]:
    # Walter, Lehmann, Lamour, Opt. Methods Softw. 27, 341 (2012): R⁺ stands for R⁻¹.
    q, r = tall_qr(*primals)
    (change,) = tangents
    quotient = change @ jnp.linalg.pinv(r)
    inner = adjoint(q) @ quotient
    # The change of R is an upper triangle times R, with a real diagonal.
    upper = jnp.triu(inner) + adjoint(jnp.tril(inner, -1))
    if jnp.iscomplexobj(upper):
        eye = jnp.eye(r.shape[-1], dtype=upper.dtype)
        upper = upper - 1j * _diagonal(inner).imag[..., None] * eye
    return (q, r), (quotient - q @ upper, upper @ r)


@jax.custom_jvp
def triangular_factor(matrix: jax.Array) -> jax.Array:
    """Return T of A = T Qᴴ, for a matrix A that is wider than tall.

    Rotating Q within the space of its columns leaves T Tᴴ unchanged. For a function of T Tᴴ, Q
    therefore counts as constant within that space, and leaves it only as A does.
    """
    return adjoint(jnp.linalg.qr(adjoint(matrix), mode="r"))


@triangular_factor.defjvp
def _triangular_factor_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (matrix,), (change,) = primals, tangents
    q, r = jnp.linalg.qr(adjoint(lax.stop_gradient(matrix)))
    factor = triangular_factor(matrix)
    q = _with_derivative_of(q, adjoint(jnp.linalg.pinv(factor) @ matrix))
    # Where A has a smaller rank, the second derivative is not known.
    size = jnp.abs(_diagonal(r))
    is_full = size.min(-1) > jnp.finfo(size.dtype).eps * r.shape[-1] * size.max(-1)
    return factor, change @ _second_derivative_if(is_full[..., None, None], q)


@jax.custom_jvp
def _second_derivative_if(known: jax.Array, array: jax.Array) -> jax.Array:
    """Return an array whose derivatives are NaN where they are not known."""
    return array


@_second_derivative_if.defjvp
def _second_derivative_if_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    known, array = primals
    return array, tangents[1] * jnp.where(known, 1, jnp.nan).astype(array.dtype)


def _with_derivative_of(array: jax.Array, expression: jax.Array) -> jax.Array:
    """Return an array with the derivative of another, perhaps less precise, expression for it."""
    return array + (expression - lax.stop_gradient(expression))


def adjoint(matrix: jax.Array) -> jax.Array:
    """Return the conjugate transpose."""
    return jnp.conj(matrix.swapaxes(-1, -2))


def _diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)
