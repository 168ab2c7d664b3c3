"""What a drawing shows of a chain of cores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tnmoe.shapes import MPOShape


@dataclass(frozen=True)
class Chain:
    """A chain of cores as a drawing shows it.

    Attributes
    ----------
    shape : MPOShape
    bonds : tuple of int
    center_site : int or None
        Site that is drawn as a square.
    owned : frozenset of int
        Sites whose cores every expert owns. They are drawn hollow.
    """

    shape: MPOShape
    bonds: tuple[int, ...]
    center_site: int | None = None
    owned: frozenset[int] = frozenset()

    def description(self) -> str:
        """Describe the drawing for readers who cannot see it."""
        parts = [
            f"A chain of cores, sites={self.shape.sites}",
            f"output legs above: {_listed(self.shape.out_dims)}",
            f"input legs below: {_listed(self.shape.in_dims)}",
        ]
        if self.bonds:
            parts.append(f"bonds between them: {_listed(self.bonds)}")
        if self.center_site is not None:
            parts.append(f"centre: site {self.center_site}")
        if self.owned:
            parts.append(f"sites that every expert owns: {_listed(sorted(self.owned))}")
        return "; ".join(parts)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def shown_ends(shown: int) -> tuple[int, int]:
    """Return how many sites a drawing shows left and right of those that it leaves out."""
    return shown - shown // 2, shown // 2
