"""Vectors through a chain one core after the other, from the right.

This order permutes nothing but the states between two cores, which are small beside the cores. It
therefore often beats the order with the fewest operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from tnmoe.backends import Array, Backend
from tnmoe.contraction.paths import CoreShapes
from tnmoe.shapes import MPOShape, chain_shapes

# Saved permutations make up for this many times the operations of the best order.
_WORTHWHILE = 1.5


class Step(NamedTuple):
    """Sizes of the product with one core: (rows, depth) · (depth, columns), ``outs`` times.

    Attributes
    ----------
    rows : float
        Vectors times the inputs that later cores contract.
    depth, columns : int
        The core as a matrix: its input and right bond, its output and left bond.
    outs : int
        Outputs that earlier cores produced.
    """

    rows: float
    depth: int
    columns: int
    outs: int


def core_by_core_steps(cores: CoreShapes, vectors: float) -> Iterator[Step]:
    """Yield the steps for a number of vectors, from the last core to the first."""
    # torch.compile traces this: it knows prod of a list, but not of a generator.
    rest, outs = prod([core[2] for core in cores]), 1
    for left, out, in_, right in reversed(cores):
        rest //= in_
        yield Step(vectors * rest, in_ * right, out * left, outs)
        outs *= out


@lru_cache(maxsize=4096)
def core_by_core_flops(cores: CoreShapes, vectors: float) -> float:
    """Count the operations for a number of vectors; the count is an integer if the number is."""
    return sum(2 * prod(step) for step in core_by_core_steps(cores, vectors))


def is_core_by_core_faster(cores: CoreShapes, vectors: float, fewest_flops: float) -> bool:
    """Decide between this order and the one with the fewest operations."""
    return core_by_core_flops(cores, vectors) <= _WORTHWHILE * fewest_flops


def core_by_core_width(shape: MPOShape, bonds: tuple[int, ...]) -> int:
    """Return the entries of the largest state of one vector."""
    width = shape.padded_in
    for rest, _, columns, outs in core_by_core_steps(chain_shapes(shape, bonds), 1):
        width = max(width, int(rest) * columns * outs)
    return width


def apply_core_by_core(xp: Backend, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply a chain to vectors (batch, padded in) → (batch, padded out).

    A core is read as the matrix (left bond · output, input · right bond), as it lies in memory.
    The state has rows (earlier outputs, batch, inputs to come) and columns (input, bond). Every
    step is then one large product, and one copy of the state that puts the new output in front.
    """
    batch, rows = vectors.shape
    state, rows = vectors, rows * batch
    for core in reversed(cores):
        left, out, in_, right = core.shape
        rows //= in_
        columns = state.reshape(rows, in_ * right)
        product = columns @ xp.transpose(core.reshape(left * out, in_ * right))
        state = xp.permute(product.reshape(rows, left, out), (2, 0, 1))
        rows *= out
    outs = prod([core.shape[1] for core in cores[1:]])
    last = product.reshape(outs, batch, cores[0].shape[1])
    return xp.permute(last, (1, 2, 0)).reshape(batch, cores[0].shape[1] * outs)
