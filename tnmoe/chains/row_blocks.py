"""A matrix that need not fit into memory, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tnmoe.backends import Array, get_backend
from tnmoe.chains.checks import KNOWN_DTYPES, check_dtype
from tnmoe.errors import InputError

_NO_BFLOAT16 = "NumPy has no bfloat16: open the safetensors file with framework='pt'"


class RowBlocks:
    """The rows of a source, such as a memory map or a tensor in a safetensors file.

    Parameters
    ----------
    source : object
        Has ``shape``, or ``get_shape()`` as slices of safetensors have, and gives the rows from
        ``start`` to ``stop - 1`` as ``source[start:stop]``: arrays of a supported library.
    on_progress : callable, optional
        Called after every block with the rows read so far, in all passes, and ``rows_to_read``.

    Attributes
    ----------
    size : tuple of int
        Rows and columns.
    rows_to_read : int
        Rows to read in all passes; to be set by who reads.
    like : array, shape (1, 1)
        One number of the source, for its library, dtype and device.

    Raises
    ------
    TypeError
        If the source has no size or no blocks, or its blocks belong to no supported library.
    InputError
        If the source is not a matrix, is empty, or is not floating-point or complex.
    """

    def __init__(self, source: Any, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.size = _size_of(source)
        self.rows_to_read = 0
        self._source, self._on_progress, self._rows_read = source, on_progress, 0
        first = self._first_row()
        self.xp = get_backend(first)
        _check_size(first, (1, self.size[1]), "the first row of the source")
        if (self.xp.name, self.xp.dtype_name(first)) == ("numpy", "bfloat16"):
            raise InputError(_NO_BFLOAT16)  # another library registered it with NumPy
        self.dtype = check_dtype(self.xp, first, f"the source must be of {KNOWN_DTYPES}")
        self.like = first[:1, :1]

    def blocks(self, rows: int) -> Iterator[tuple[Array, str]]:
        """Read all blocks of up to ``rows`` rows; yield each with its name for messages.

        Raises
        ------
        InputError
            If a block is not of the size or the dtype of the source.
        """
        for start in range(0, self.size[0], rows):
            stop = min(start + rows, self.size[0])
            yield self._read(start, stop), f"rows {start} to {stop - 1} of the source"
            self._rows_read += stop - start
            if self._on_progress is not None:
                self._on_progress(self._rows_read, self.rows_to_read)

    def _first_row(self) -> Array:
        try:
            return self._source[:1]
        except TypeError as error:
            if "bfloat16" in str(error):
                raise InputError(_NO_BFLOAT16) from error
            raise

    def _read(self, start: int, stop: int) -> Array:
        block, name = self._source[start:stop], f"rows {start} to {stop - 1} of the source"
        _check_size(block, (stop - start, self.size[1]), name)
        if (dtype := self.xp.dtype_name(block)) != self.dtype:
            raise InputError(f"{name} are of {dtype}, and its first row is of {self.dtype}")
        return block


def _size_of(source: Any) -> tuple[int, int]:
    """Return the size of a source."""
    size = source.get_shape() if hasattr(source, "get_shape") else getattr(source, "shape", None)
    if size is None or not hasattr(type(source), "__getitem__"):
        raise TypeError(
            "expected a source with a shape (rows, columns) and blocks source[start:stop] of rows, "
            f"got {type(source).__qualname__}"
        )
    size = tuple(map(int, size))
    if len(size) != 2 or 0 in size:
        raise InputError(f"expected a source with rows and columns, got one of shape {size}")
    return size


def _check_size(block: Array, expected: tuple[int, int], name: str) -> None:
    """Raise an InputError unless a block has the size that the source's shape says."""
    found = tuple(block.shape)
    if found != expected:
        raise InputError(f"{name} should be a block of shape {expected}, got {found}")
