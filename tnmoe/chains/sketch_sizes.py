"""How many vectors the sketch of a streamed decomposition has, and how much memory that takes."""

from __future__ import annotations

import numpy as np

from tnmoe.backends.protocol import WIDE_DTYPE
from tnmoe.chains.division import Division
from tnmoe.chains.range_finder import FIRST_RANK, OVERSAMPLING
from tnmoe.errors import InputError
from tnmoe.system.memory import in_gigabytes
from tnmoe.truncation.limits import Limits

# Vectors of the first sketch where a tolerance decides.
_FIRST_SIZE = 4 * FIRST_RANK + OVERSAMPLING
# Part of the memory for a block of rows and what is computed from it; one group of rows may take
# more.
_BLOCK_PART = 0.25


class SketchSizes:
    """Sizes that fit into the memory.

    Parameters
    ----------
    limits : Limits
        Of the decomposition, with at least two sites.
    dtype : str
        Of the computation.
    memory : int
        Bytes that it may take.

    Attributes
    ----------
    division : Division
        The one that needs least memory.
    largest : int
        Number of vectors of a sketch that misses nothing that the limits could keep.
    first : int
        Number of vectors to begin with.
    """

    def __init__(self, limits: Limits, dtype: str, memory: int) -> None:
        self._limits, self._memory = limits, memory
        self._narrow = np.dtype(dtype).itemsize
        self._wide = np.dtype(WIDE_DTYPE.get(dtype, dtype)).itemsize
        self.division = min(
            (Division(limits.shape, head) for head in range(1, limits.shape.sites)),
            key=lambda division: self._bytes(division, self._wanted(division)),
        )
        self.largest = self._largest(self.division)
        self.first = self._wanted(self.division)
        if limits.rtol is not None:
            while self.first > 2 * OVERSAMPLING and not self.fits(self.first):
                self.first //= 2

    def fits(self, size: int) -> bool:
        """Return whether sketches of ``size`` vectors fit into the memory."""
        return self._bytes(self.division, size) <= self._memory

    def check(self, size: int) -> None:
        """Raise an InputError unless sketches of ``size`` vectors fit into the memory."""
        if not self.fits(size):
            shape, needed = self._limits.shape, self._bytes(self.division, size)
            raise InputError(
                f"streaming a {(shape.out_features, shape.in_features)} matrix with a sketch of "
                f"{size} vectors takes {in_gigabytes(needed)}, more than memory={self._memory}: "
                f"allow memory={needed}, smaller bonds or a larger error"
            )

    def block_rows(self, vectors: int) -> int:
        """Return how many rows to read at a time, for products with some vectors."""
        group = self.division.block_bytes(vectors, self._wide)
        groups = max(1, int(_BLOCK_PART * self._memory) // group)
        return groups * self.division.tail_rows

    def _bytes(self, division: Division, size: int) -> int:
        return division.peak_bytes(size, self._wide, self._narrow)

    def _largest(self, division: Division) -> int:
        rows = division.groups * division.head_columns
        cap = self._limits.caps[division.head - 1]
        return min(cap + OVERSAMPLING, division.tail, rows + OVERSAMPLING)

    def _wanted(self, division: Division) -> int:
        largest = self._largest(division)
        return largest if self._limits.rtol is None else min(_FIRST_SIZE, largest)
