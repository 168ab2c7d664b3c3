"""Pieces of a batch: how many rows go through a chain of cores together."""

from __future__ import annotations

import sys

from tnmoe.shapes import MPOShape

# Largest number of entries that a state between two cores may have. A batch whose state would be
# larger goes through in pieces, and training computes each piece again for the backward pass.
# In single precision the limit is 512 MiB.
STATE_LIMIT = 1 << 27


def rows_per_piece(width: float, row_size: int) -> int:
    """Count the rows that may go through together.

    There is no limit where no state is larger than the rows or their results.

    Parameters
    ----------
    width : float
        Entries that the largest state has per row.
    row_size : int
        Entries of a row or of its result, whichever has more.
    """
    return sys.maxsize if width <= row_size else max(1, int(STATE_LIMIT // width))


def peak_in_pieces(peak: int, batch: int, shape: MPOShape) -> int:
    """Return the entries of the largest intermediate array of ``batch`` vectors in pieces.

    ``peak`` is what the array has when all vectors go through at once.
    """
    # Pieces do not shrink products of cores alone, which are no larger than the matrix.
    if batch == 0 or peak <= shape.padded_out * shape.padded_in:
        return peak
    step = rows_per_piece(peak / batch, max(shape.padded_in, shape.padded_out))
    return min(peak, round(step * peak / batch))
