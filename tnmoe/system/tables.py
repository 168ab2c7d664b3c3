"""Plain-text tables and lists, for messages and for reports in a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Names that a message lists.
_MAX_NAMES = 4


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table: the first column to the left, the others to the right, 1234 as 1,234.

    Examples
    --------
    >>> print(format_table(["model", "parameters"], [["dense", 1234], ["MPOE", "n/a"]]))
    model  parameters
    -----  ----------
    dense       1,234
    MPOE          n/a
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    table = [list(headers), *cells]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def listed(names: Iterable[object]) -> str:
    """Join the first few names in alphabetical order, and count the rest.

    Examples
    --------
    >>> listed("edcba")
    'a, b, c, d and 1 more'
    """
    ordered = sorted(map(str, names))
    rest = len(ordered) - _MAX_NAMES
    return ", ".join(ordered[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def shortened(items: Iterable[Any], most: int = 3) -> str:
    """Print items as a list does, and of many only the first few and their number."""
    items = list(items)
    shown = ", ".join(map(repr, items[:most]))
    return f"[{shown}, … {len(items)} in all]" if len(items) > most else f"[{shown}]"
