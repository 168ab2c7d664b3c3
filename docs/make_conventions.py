"""Draw the picture of how libraries order axes and cores, for the page on other libraries.

``python docs/make_conventions.py`` writes ``docs/_static/conventions.svg``; a given matplotlib
always writes the same bytes.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from tnmoe.plot.style import COLORS, GREY

TARGET = Path(__file__).parent / "_static/conventions.svg"
SITES = 3
# Inches. The white ground keeps black lines readable on dark pages.
SIZE, GROUND = (7.2, 4.6), "white"
# In units of the distance between two sites: half a core, the end of a line, the number of an axis.
CORE, END, NUMBER = 0.2, 0.62, 0.33
# Where the line of an axis goes, as a step to the right and a step up.
STEPS = {"l": (-1, 0), "o": (0, 1), "i": (0, -1), "r": (1, 0)}


class Convention(NamedTuple):
    """How libraries write a chain of cores as a list."""

    libraries: str
    axes: str  # as of tnmoe.interop.to_cores
    output_leg: str  # names of the legs, with {} for the number of the site
    input_leg: str
    outermost_bonds: bool = True
    reverse: bool = False  # the list starts with the last site

    @property
    def call(self) -> str:
        """What one passes to ``to_cores`` and ``from_cores`` for such a list."""
        more = ", list reversed" * self.reverse
        return f'"{self.axes}"' + ", outermost_bonds=False" * (not self.outermost_bonds) + more


CONVENTIONS = (
    Convention("tnmoe, tensorly, torchTT, tntorch", "loir", "output leg", "input leg"),
    Convention("quimb", "lroi", "k{}", "b{}", outermost_bonds=False),
    Convention("TeNPy, TensorNetwork", "lroi", "p", "p*"),
    Convention("ttpy", "roil", "n", "m", reverse=True),
)


def draw_core(ax: Axes, convention: Convention, site: int) -> None:
    """Draw the core of a site: its place in the list, and the number of each of its axes."""
    outermost = {letter for letter, end in (("l", 0), ("r", SITES - 1)) if site == end}
    axes = [
        letter
        for letter in convention.axes
        if convention.outermost_bonds or letter not in outermost
    ]
    for number, letter in enumerate(axes):
        x, y = STEPS[letter]
        style = {"color": GREY, "linestyle": ":"} if letter in outermost else {"color": "black"}
        end = END if letter in {"o", "i", *outermost} else 0.5
        ax.plot([site, site + end * x], [0, end * y], linewidth=1.5, zorder=1, **style)
        # Beside the line: right of a leg, above a bond.
        place = (site + NUMBER * x + 0.08 * abs(y), NUMBER * y + 0.09 * abs(x))
        ax.text(*place, str(number), color=COLORS[1], weight="bold", ha="center", va="center")
    place = SITES - 1 - site if convention.reverse else site
    ax.add_patch(Circle((site, 0), CORE, color=COLORS[0], zorder=2))
    ax.text(site, -0.01, str(place), color="white", ha="center", va="center", zorder=3)
    for name, height in ((convention.output_leg, END), (convention.input_leg, -END)):
        ax.text(
            site, height * 1.07, name.format(site), ha="center", fontsize="small",
            va="bottom" if height > 0 else "top",
        )  # fmt: skip


def draw(target: Path) -> None:
    """Draw the picture into a file."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor=GROUND)
    for ax, convention in zip(figure.subplots(2, 2).flat, CONVENTIONS, strict=True):
        for site in range(SITES):
            draw_core(ax, convention, site)
        ax.set(xlim=(-0.8, SITES - 0.2), ylim=(-0.9, 0.9), aspect="equal")
        ax.set_title(f"{convention.libraries}\n{convention.call}", fontsize="medium")
        ax.axis("off")
    # Without a salt and without a date, every run would write another file.
    with matplotlib.rc_context({"svg.hashsalt": target.stem}):
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(TARGET)
