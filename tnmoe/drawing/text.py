"""A chain of cores as three lines of text."""

from __future__ import annotations

from tnmoe.drawing.chain import Chain, shown_ends

MAX_WIDTH = 100

# A site or a bond: its parts of the three lines, equally wide.
_Column = tuple[str, str, str]


def draw_text(chain: Chain) -> str:
    """Draw a chain: output legs above the cores, input legs below, bond dimensions between.

    The central core is a square, and a core that every expert owns is hollow. Sites in the middle
    are left out where the lines would be longer than ``MAX_WIDTH``.

    Parameters
    ----------
    chain : Chain
        What to draw.

    Examples
    --------
    >>> from tnmoe.shapes import MPOShape
    >>> print(draw_text(Chain(MPOShape((4, 16, 4), (3, 4, 3)), (12, 9), center_site=1)))
    4    16   4
    ●─12─■──9─●
    3    4    3
    """
    columns, shown = _columns(chain), chain.shape.sites
    lines = _lines(columns)
    while len(lines[1]) > MAX_WIDTH and shown > 2:
        shown -= 1
        lines = _lines(_shortened(columns, shown))
    return "\n".join(line.rstrip() for line in lines)


def _columns(chain: Chain) -> list[_Column]:
    """Return the columns of site 0, bond 0, site 1, bond 1 and so on."""
    legs = zip(chain.shape.out_dims, chain.shape.in_dims, strict=True)
    sites = [_centered(str(out), _mark(chain, k), str(in_)) for k, (out, in_) in enumerate(legs)]
    bonds = [_centered("", f"─{bond}─", "") for bond in chain.bonds]
    columns = [sites[0]]
    for bond, site in zip(bonds, sites[1:], strict=True):
        columns += [bond, site]
    return columns


def _mark(chain: Chain, site: int) -> str:
    hollow, filled = ("□", "■") if site == chain.center_site else ("○", "●")
    return hollow if site in chain.owned else filled


def _centered(above: str, middle: str, below: str) -> _Column:
    width = max(map(len, (above, middle, below)))
    return above.center(width), middle.center(width, "─"), below.center(width)


def _shortened(columns: list[_Column], shown: int) -> list[_Column]:
    """Leave out sites in the middle; the bonds that lead to them stay."""
    left, right = shown_ends(shown)
    gap = f" ⋯ {len(columns) // 2 + 1 - shown} sites ⋯ "
    return [*columns[: 2 * left], (" " * len(gap), gap, " " * len(gap)), *columns[-2 * right :]]


def _lines(columns: list[_Column]) -> list[str]:
    above, middle, below = ("".join(parts) for parts in zip(*columns, strict=True))
    # The outermost cores have no bond to the outside.
    middle = middle.lstrip("─").rjust(len(middle)).rstrip("─")
    return [above, middle, below]
