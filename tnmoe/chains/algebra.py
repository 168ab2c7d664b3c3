"""Algebra of chains of cores, without forming the matrix.

Sums put cores side by side as blocks, and products multiply bonds (Oseledets, SIAM J. Sci. Comput.
33, 2295 (2011), section 4). Scalars come from sweeps that contract one site after the other.
Cores have shapes (D, out, in, D'), with outermost bonds of 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from math import prod
from numbers import Number
from operator import add as add_arrays
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES
from tnmoe.chains.precision import computable, in_one_dtype
from tnmoe.contraction.apply import apply_cores
from tnmoe.contraction.apply_experts import apply_experts
from tnmoe.contraction.einsum import contract
from tnmoe.errors import InputError, short_repr
from tnmoe.shapes import MPOShape

Cores = Sequence[Array]


def add(xp: Backend, chains: Sequence[Cores]) -> list[Array]:
    """Add chains with the same legs; their bonds add up."""
    if len(chains) == 1:
        return list(chains[0])
    sites = len(chains[0])
    if sites == 1:
        return [reduce(add_arrays, (chain[0] for chain in chains))]
    middle = [
        _block_diagonal(xp, [chain[site] for chain in chains]) for site in range(1, sites - 1)
    ]
    first = xp.concatenate([chain[0] for chain in chains], 3)
    return [first, *middle, xp.concatenate([chain[-1] for chain in chains], 0)]


def _block_diagonal(xp: Backend, blocks: Sequence[Array]) -> Array:
    """Join cores (D, out, in, D') as blocks along both bonds."""
    columns = sum(block.shape[3] for block in blocks)
    rows, start = [], 0
    for block in blocks:
        left, out, in_, right = block.shape
        before = xp.zeros((left, out, in_, start), like=block)
        start += right
        after = xp.zeros((left, out, in_, columns - start), like=block)
        rows.append(xp.concatenate([before, block, after], 3))
    return xp.concatenate(rows, 0)


def as_factor(xp: Backend, value: Any, like: Array) -> Any:
    """Return a number as a factor or divisor of an array that keeps its dtype.

    Parameters
    ----------
    xp : Backend
        Library of ``like``.
    value : object
        A number of Python or NumPy, or an array without axes. Gradients flow through one of the
        same library.
    like : array
        What is multiplied or divided.

    Returns
    -------
    number, array or None
        A Python number, or an array without axes in the dtype of ``like``; None if ``value`` is no
        number.

    Raises
    ------
    InputError
        If ``value`` is complex and ``like`` is not, or has gradients in another library.
    """
    if getattr(value, "shape", None) != ():
        if not isinstance(value, Number):
            return None
        # Fractions and decimals would make arrays of objects.
        is_plain = isinstance(value, int | float | complex)
        factor = value if is_plain else float(value)  # type: ignore[arg-type]
        _check_complex(xp, isinstance(factor, complex), value, like)
        return factor
    theirs = get_backend(value)
    _check_complex(xp, theirs.dtype_name(value) in COMPLEX_DTYPES, value, like)
    if theirs is xp:
        return xp.astype(value, xp.dtype_name(like))
    if theirs.tracked(value):
        raise InputError(
            f"a {theirs.name} number with gradients cannot multiply or divide {xp.name} cores, "
            "which would lose them"
        )
    return theirs.to_numpy(value).item()


def _check_complex(xp: Backend, is_complex: bool, value: Any, like: Array) -> None:
    """Raise if a number is complex, and an array that it multiplies or divides is not."""
    name = xp.dtype_name(like)
    if is_complex and name not in COMPLEX_DTYPES:
        raise InputError(
            f"cannot multiply or divide real cores ({name}) by a complex {short_repr(value)}"
        )


def compose(xp: Backend, left: Cores, right: Cores) -> tuple[Array, ...]:
    """Multiply two operators, left · right; their bonds multiply."""
    cores = []
    for a, b in zip(left, right, strict=True):
        product = contract(xp, "aoxb,cxid->acoibd", a, b)
        cores.append(product.reshape(a.shape[0] * b.shape[0], a.shape[1], b.shape[2], -1))
    return tuple(cores)


def entrywise(left: Cores, right: Cores) -> list[Array]:
    """Multiply two operators with the same legs entry by entry; their bonds multiply."""
    return [
        (a[:, None, :, :, :, None] * b[None, :, :, :, None, :]).reshape(
            a.shape[0] * b.shape[0], *a.shape[1:3], -1
        )
        for a, b in zip(left, right, strict=True)
    ]


def product_shape(left: MPOShape, right: MPOShape) -> MPOShape:
    """Return the shape of a product; raise an InputError unless the inner legs agree."""
    if left.in_dims != right.out_dims or left.in_features != right.out_features:
        raise InputError(
            f"cannot compose: the input legs of {left} are not the output legs of {right}"
        )
    return MPOShape(left.out_dims, right.in_dims, left.out_features, right.in_features)


def product_factors(
    xp: Backend, left_shape: MPOShape, left: Cores, right: Cores
) -> tuple[Cores, Cores]:
    """Return two chains, ready to be multiplied, in a dtype with linear algebra.

    Truncations may have left numbers in the padding between the two. A projector removes them, so
    that they do not enter the product.
    """
    left, right = ([computable(xp, core) for core in cores] for cores in (left, right))
    if left_shape.padded_in != left_shape.in_features:
        projector = leading_projector(xp, left_shape.in_dims, left_shape.in_features, right[0])
        right = compose(xp, projector, right)
    return left, right


def apply(xp: Backend, shape: MPOShape, cores: Cores, x: Array) -> Array:
    """Apply an operator to vectors along the last axis: (..., in) → (..., out)."""
    # Sizes are spelled out: -1 is ambiguous for an empty batch.
    vectors = x.reshape(prod(x.shape[:-1]), shape.in_features)
    if shape.padded_in != shape.in_features:
        vectors = xp.pad(vectors, vectors.shape[0], shape.padded_in)
    vectors, *computed = in_one_dtype(xp, [vectors, *cores])
    same = xp.dtype_name(x) == xp.dtype_name(cores[0])
    dtype = xp.dtype_name(cores[0] if same else vectors)
    result = xp.astype(apply_cores(xp, shape, computed, vectors), dtype)
    return result[:, : shape.out_features].reshape(*x.shape[:-1], shape.out_features)


def apply_shared(xp: Backend, shape: MPOShape, cores: Cores, x: Array) -> Array:
    """Apply experts that share some cores: (E or 1, ..., in) → (E, ..., out)."""
    groups, *batch, _ = x.shape
    vectors = x.reshape(groups, prod(batch), shape.in_features)
    if shape.padded_in != shape.in_features:
        vectors = xp.pad(vectors, vectors.shape[1], shape.padded_in)
    vectors, *computed = in_one_dtype(xp, [vectors, *cores])
    same = xp.dtype_name(x) == xp.dtype_name(cores[0])
    dtype = xp.dtype_name(cores[0] if same else vectors)
    result = xp.astype(apply_experts(xp, shape, computed, vectors), dtype)
    return result[..., : shape.out_features].reshape(result.shape[0], *batch, shape.out_features)


def transpose(xp: Backend, cores: Cores) -> list[Array]:
    """Swap output and input legs."""
    return [xp.permute(core, (0, 2, 1, 3)) for core in cores]


def inner(xp: Backend, bra: Cores, ket: Cores) -> Array:
    """Sum conj(bra) · ket over all entries; a scalar array."""
    environment = xp.eye(1, like=bra[0])
    for a, b in zip(bra, ket, strict=True):
        # Two products of matrices as they lie in memory, without a permutation.
        carried = environment @ b.reshape(b.shape[0], -1)
        bra_rows = a.reshape(-1, a.shape[-1])
        environment = xp.adjoint(bra_rows) @ carried.reshape(-1, b.shape[-1])
    return environment.reshape(())


def trace(xp: Backend, shape: MPOShape, cores: Cores) -> Array:
    """Sum the diagonal of the matrix; a scalar array."""
    if shape.padded_out != shape.out_features:
        projector = leading_projector(xp, shape.out_dims, shape.out_features, cores[0])
        cores = compose(xp, projector, cores)
    product = xp.eye(1, like=cores[0])
    for core in cores:
        product = product @ xp.trace(core, 1, 2)
    return product.reshape(())


def partial_trace(
    xp: Backend, shape: MPOShape, cores: Cores, sites: Collection[int]
) -> tuple[list[Array], Array]:
    """Sum the diagonals of some sites.

    Returns
    -------
    list of array
        Cores of the other sites.
    array, shape (D, D')
        What stands right of them: a factor of the last core, or the trace of the whole (1, 1).
    """
    kept: list[Array] = []
    carry = xp.eye(1, like=cores[0])
    for site, core in enumerate(_without_padding(xp, shape, cores)):
        if site in sites:
            carry = carry @ xp.trace(core, 1, 2)
            continue
        merged = carry @ core.reshape(core.shape[0], -1)
        kept.append(merged.reshape(-1, *core.shape[1:]))
        carry = xp.eye(core.shape[3], like=core)
    return kept, carry


def _without_padding(xp: Backend, shape: MPOShape, cores: Cores) -> Cores:
    """Set what truncations may have left in the padding to zero."""
    if shape.padded_out != shape.out_features:
        rows = leading_projector(xp, shape.out_dims, shape.out_features, cores[0])
        cores = compose(xp, rows, cores)
    if shape.padded_in != shape.in_features:
        columns = leading_projector(xp, shape.in_dims, shape.in_features, cores[0])
        cores = compose(xp, cores, columns)
    return cores


def identity(xp: Backend, shape: MPOShape, like: Array) -> list[Array]:
    """Return the identity of a square shape; all bonds are 1, or 2 with padding."""
    if shape.padded_out != shape.out_features:
        return leading_projector(xp, shape.out_dims, shape.out_features, like)
    return [xp.eye(leg, like=like)[None, :, :, None] for leg in shape.out_dims]


def leading_projector(xp: Backend, legs: Sequence[int], size: int, like: Array) -> list[Array]:
    """Return the projector onto the first ``size`` of Π legs indices; all bonds are 2.

    An index is below ``size`` if its digit is the smaller one at the first leg where their digits
    differ. State 0 of a bond means "equal so far", state 1 "smaller already".
    """
    digits = []
    for leg in reversed(legs):
        digits.append((size - 1) % leg)
        size = (size - 1) // leg + 1
    cores = []
    for site, (leg, digit) in enumerate(zip(legs, reversed(digits), strict=True)):
        core = np.zeros((2, leg, leg, 2))
        for index in range(leg):
            core[1, index, index, 1] = 1
            if index <= digit:
                core[0, index, index, int(index < digit)] = 1
        core = core[:1] if site == 0 else core
        # Both states end as "below": the last index of the range is size − 1 itself.
        core = core.sum(axis=3, keepdims=True) if site == len(legs) - 1 else core
        cores.append(xp.from_numpy(core, like=like))
    return cores


def random(
    xp: Backend,
    core_shapes: Sequence[tuple[int, int, int, int]],
    rng: np.random.Generator,
    like: Array,
) -> list[Array]:
    """Draw normal cores, scaled so that every entry of the operator has variance 1."""
    return [xp.normal(shape, rng, like=like) * (shape[3] ** -0.5) for shape in core_shapes]
