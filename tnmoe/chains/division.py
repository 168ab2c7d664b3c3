"""The division of a shape at one bond, for a matrix that is read in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.chains.interleave import interleave
from tnmoe.shapes import MPOShape

# Measured memory, in arrays of double precision: of a block and what is computed from it, and of a
# sketch with the truncation of the tail. The last number is of the projected matrix with the
# decomposition of the head, in the dtype of the computation.
_BLOCK_COPIES = 4
_SKETCH_COPIES = 6
_HEAD_COPIES = 5


@dataclass(frozen=True)
class Division:
    """The sites of a shape as a head and a tail, with a bond between them.

    Rows that follow each other differ in the output legs of the tail first. A group of
    ``tail_rows`` rows has one index of all output legs of the head.

    Parameters
    ----------
    shape : MPOShape
    head : int
        Number of sites of the head: at least 1, and fewer than all.
    """

    shape: MPOShape
    head: int

    @property
    def head_columns(self) -> int:
        """Product of the input legs of the head."""
        return prod(self.shape.in_dims[: self.head])

    @property
    def tail_rows(self) -> int:
        """Product of the output legs of the tail."""
        return prod(self.shape.out_dims[self.head :])

    @property
    def tail_columns(self) -> int:
        """Product of the input legs of the tail."""
        return prod(self.shape.in_dims[self.head :])

    @property
    def tail(self) -> int:
        """Product of all legs of the tail."""
        return self.tail_rows * self.tail_columns

    @property
    def groups(self) -> int:
        """Number of groups of rows, without those that are padding alone."""
        return -(-self.shape.out_features // self.tail_rows)

    def unfold(self, xp: Backend, block: Array) -> Array:
        """Return whole groups of rows, (rows, columns), as an array (groups · legs, tail legs).

        The last group may lack rows, which are zero.
        """
        rows, columns = block.shape
        groups = -(-rows // self.tail_rows)
        shape = MPOShape(
            (groups, self.tail_rows), (self.head_columns, self.tail_columns), rows, columns
        )
        return interleave(xp, block, shape, 1).reshape(-1, self.tail)

    def head_shape(self, bond: int) -> MPOShape:
        """Return the shape of the head, with one more site whose input leg is the bond."""
        head = slice(self.head)
        return MPOShape(
            (*self.shape.out_dims[head], 1), (*self.shape.in_dims[head], bond), self.groups
        )

    def tail_shape(self, bond: int) -> MPOShape:
        """Return the shape of the tail, with a site before it whose output leg is the bond."""
        tail = slice(self.head, None)
        return MPOShape((bond, *self.shape.out_dims[tail]), (1, *self.shape.in_dims[tail]))

    def block_bytes(self, vectors: int, wide: int) -> int:
        """Estimate the memory for one group of rows, and for its products with some vectors.

        Parameters
        ----------
        vectors : int
        wide : int
            Bytes of a number in double precision.
        """
        entries = _BLOCK_COPIES * self.tail + 2 * vectors
        return self.head_columns * entries * wide

    def peak_bytes(self, vectors: int, wide: int, narrow: int) -> int:
        """Estimate the least memory of a decomposition.

        Parameters
        ----------
        vectors : int
            Of the sketch.
        wide, narrow : int
            Bytes of a number in double precision, and in the dtype of the computation.
        """
        sketch = _SKETCH_COPIES * self.tail * vectors * wide
        projected = self.groups * self.head_columns * vectors * narrow
        projecting = self.tail * vectors * wide + _HEAD_COPIES * projected
        return self.block_bytes(vectors, wide) + max(sketch, projecting)
