"""Parts of a work that several processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from tnmoe.errors import InputError, check_positive_int, short_repr

T = TypeVar("T")


class Part(NamedTuple):
    """One of several parts of a work, such as 2/4.

    Attributes
    ----------
    number : int
        From 1 to ``total``.
    total : int
        Number of parts.
    """

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def share(self, steps: Sequence[T]) -> Sequence[T]:
        """Return the steps of a work that belong to the part.

        Every ``total``-th step is one: neighbours, which take about as long, go to several parts.
        """
        return steps[self.number - 1 :: self.total]


def check_part(value: Any) -> Part:
    """Return a pair of integers as a part; raise an InputError for anything else."""
    try:
        number, total = value
        part = Part(check_positive_int("part", number), check_positive_int("part", total))
    except (TypeError, ValueError):  # an InputError is a ValueError
        part = None
    if part is None or part.number > part.total:
        raise InputError(
            "part must be a pair (i, n) of integers with 1 <= i <= n, as (2, 4), "
            f"got {short_repr(value)}"
        )
    return part
