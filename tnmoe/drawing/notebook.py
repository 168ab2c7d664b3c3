"""A chain of cores as a picture (SVG) and as a page (HTML) for notebooks.

Lines and letters have the colour of the text around them, so they suit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log2

from tnmoe.drawing.chain import Chain, shown_ends

# A longer chain loses sites in its middle.
_MAX_SITES = 12
# In pixels: between two sites, or more where numbers are long; half a core; from the line of cores
# to the end of a leg; above and below that line; of a letter.
_STEP, _HALF, _LEG, _HEIGHT, _LETTER = 84, 11, 34, 56, 8


def draw_svg(chain: Chain, entropies: Sequence[float] | None = None) -> str:
    """Draw a chain as SVG: output legs point up, input legs down.

    The central core is a square, and a core that every expert owns is hollow. A line is the thicker
    the larger its dimension, and dotted for dimension 1.

    Parameters
    ----------
    chain : Chain
        What to draw.
    entropies : sequence of float, optional
        Of the bonds, in nats. They stand below the bonds.
    """
    step, sites = _step(chain), chain.shape.sites
    left, right = shown_ends(min(sites, _MAX_SITES))
    # Sites that are left out have the room of two.
    gap = 0 if left + right == sites else 2
    places = {site: (site + 0.5) * step for site in range(left)}
    for offset in range(right):
        places[sites - right + offset] = (left + gap + offset + 0.5) * step
    parts = [_site(chain, site, x) for site, x in places.items()]
    for bond, size in enumerate(chain.bonds):
        if {bond, bond + 1} & set(places):
            start = places[bond] if bond in places else places[bond + 1] - step
            parts.append(_line(start + _HALF, 0, start + step - _HALF, 0, size))
            parts.append(_label(start + step / 2, -7, size))
            if entropies is not None:
                parts.append(_label(start + step / 2, 17, f"S {entropies[bond]:.2f}"))
    if gap:
        parts.append(_label((left + 1) * step, 4, f"⋯ {sites - left - right} sites ⋯"))
    width, text = round((left + gap + right) * step), escape(chain.description())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{text}" '
        f'width="{width}" height="{2 * _HEIGHT}" '
        f'viewBox="0 {-_HEIGHT} {width} {2 * _HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="currentColor" stroke="none">'
        f"<title>{text}</title>{''.join(parts)}</svg>"
    )


def draw_html(heading: str, chain: Chain, entropies: Sequence[float] | None = None) -> str:
    """Draw a chain as HTML: a heading, the picture, and a table of the bonds.

    Parameters
    ----------
    heading : str
        Plain text above the picture.
    chain : Chain
        What to draw.
    entropies : sequence of float, optional
        Of the bonds, in nats.
    """
    columns: list[Sequence[object]] = [
        range(len(chain.bonds)),
        chain.bonds,
        chain.shape.bond_dims(),
    ]
    names = ["bond", "dimension", "exact"]
    if entropies is not None:
        columns.append([f"{entropy:.3f}" for entropy in entropies])
        names.append("entropy (nats)")
    table = _row("th", names) + "".join(_row("td", row) for row in zip(*columns, strict=True))
    bonds = f"<details><summary>Bonds</summary><table>{table}</table></details>"
    return (
        f"<div><code>{escape(heading)}</code>"
        f'<div style="overflow-x: auto">{draw_svg(chain, entropies)}</div>'
        f"{bonds if chain.bonds else ''}</div>"
    )


def _step(chain: Chain) -> int:
    numbers = (*chain.shape.out_dims, *chain.shape.in_dims, *chain.bonds)
    return max(_STEP, _LETTER * max(len(str(number)) for number in numbers) + 2 * _HALF)


def _site(chain: Chain, site: int, x: float) -> str:
    """Draw a core with its two legs."""
    pen = f'stroke="currentColor" fill-opacity="{0 if site in chain.owned else 0.25}"'
    if site == chain.center_site:
        side = 2 * _HALF
        core = f'<rect x="{x - _HALF:g}" y="{-_HALF}" width="{side}" height="{side}" {pen}/>'
    else:
        core = f'<circle cx="{x:g}" cy="0" r="{_HALF}" {pen}/>'
    out, in_ = chain.shape.out_dims[site], chain.shape.in_dims[site]
    up = _line(x, -_HALF, x, -_LEG, out) + _label(x, -_LEG - 6, out)
    down = _line(x, _HALF, x, _LEG, in_) + _label(x, _LEG + 15, in_)
    return core + up + down


def _line(x1: float, y1: float, x2: float, y2: float, size: int) -> str:
    dots = ' stroke-dasharray="2 3"' if size == 1 else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="currentColor" '
        f'stroke-width="{1 + log2(size) / 3:.2g}"{dots}/>'
    )


def _label(x: float, y: float, text: object) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle">{text}</text>'


def _row(cell: str, values: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{cell}>{value}</{cell}>" for value in values) + "</tr>"
