"""One style for all pictures: colours, markers, axes, names, legends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tnmoe.errors import InputError

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What tells series apart in greyscale. The three cycles differ in length, so that a combination
# only returns after 252 series.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINE_STYLES = ("-", "--", "-.", ":")
# For what stands beside the data: limits, legs of size 1.
GREY = "0.55"

_MARKERS_PER_LINE = 8
# Characters from which on names drop what they have in common, and their middle.
_LONG_NAME, _LONGEST_NAME = 20, 40
# Entries up to which a legend stands inside, and of one of its columns outside.
_LONGEST_LEGEND, _MOST_ROWS = 8, 24
# From this ratio of the largest to the smallest on, an axis is logarithmic.
FAR_APART = 30
# Inches: a new figure's width, its usual height, what is above and below its rows, and a row.
_WIDTH, _HEIGHT, _AROUND, _ROW = 6.4, 4.8, 1.0, 0.45


def new_axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The axes given, or those of a new figure, of so many inches."""
    if ax is None:
        # Imported late: who gives axes never meets pyplot and its list of open figures.
        import matplotlib.pyplot as plt

        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InputError(f"ax must be one matplotlib Axes, got {type(ax).__qualname__}")
    return ax


def rows_size(rows: int) -> tuple[float, float]:
    """Size in inches of a new figure whose height follows its number of rows."""
    return _WIDTH, min(_HEIGHT, _AROUND + _ROW * rows)


def line_style(index: int, points: int) -> dict[str, Any]:
    """How the line of that index looks, with a marker at every point or at a few of many."""
    every = max(1, points // _MARKERS_PER_LINE)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        # Lines that lie on each other show their markers side by side.
        "markevery": (index * every // 3 % every, every),
        "markersize": 5,
    }


def shown(name: object) -> str:
    """A name as text that matplotlib draws as it is, a long one without its middle."""
    text = str(name)
    if len(text) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        text = f"{text[: half - 1]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    # Legends leave out what starts with an underscore.
    return f" {text}" if text.startswith("_") else text


def shown_apart(names: Iterable[object]) -> tuple[list[str], str | None]:
    """Names that are to stand beside each other, and what was cut from all of them, if anything.

    Examples
    --------
    >>> shown_apart(["model.layers.0.moe.gate.router", "model.layers.1.moe.gate.router"])
    (['0', '1'], 'model.layers.*.moe.gate.router')
    """
    texts = [str(name) for name in names]
    if len(texts) == 1 or max(map(len, texts)) <= _LONG_NAME:
        return [shown(text) for text in texts], None
    words = [re.findall(r"[ ,./]|[^ ,./]+", text) or [""] for text in texts]
    start = _common_start(words)
    end = _common_start([each[start:][::-1] for each in words])
    own = [shown("".join(each[start : len(each) - end])) for each in words]
    first = words[0]
    common = "".join([*first[:start], "*", *first[len(first) - end :]])
    return own, shown(common) if start + end else None


def _common_start(names: Sequence[Sequence[str]]) -> int:
    """With how many words all names begin, when each keeps one of its own."""
    columns = zip(*(words[:-1] for words in names), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def count_on(axis: Axis) -> None:
    """Whole numbers on an axis, no more than have room."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def from_zero(ax: Axes) -> None:
    """The y-axis from 0 on, with room for markers that lie on it."""
    top = max(float(ax.dataLim.y1), 0.0) or 1.0
    ax.set_ylim(-0.03 * top, 1.05 * top)


def decade_below(number: float) -> float:
    """The largest power of ten that is not above a positive number."""
    return float(10 ** np.floor(np.log10(number)))


def decades_and_zero(ax: Axes, lowest: float, highest: float) -> None:
    """A logarithmic y-axis for positive values between these, with zero at its lower end."""
    start = decade_below(lowest)
    ax.set_yscale("symlog", linthresh=start, linscale=max(0.5, np.log10(highest / start) / 8))
    ax.set_ylim(bottom=-0.2 * start)


def scale_sizes(ax: Axes, sizes: np.ndarray) -> None:
    """An x-axis of sizes with readable numbers, logarithmic if they are far apart."""
    if sizes.max() > FAR_APART * sizes.min() > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))


def short(count: float) -> str:
    """A number of parameters in three digits: 950, 4.72 M, 1.2 B."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def add_legend(ax: Axes, title: str | None = None) -> None:
    """A legend inside, or beside the axes where many entries would hide the data."""
    entries = len(ax.get_legend_handles_labels()[1])
    if entries <= _LONGEST_LEGEND:
        ax.legend(fontsize="small", title=title, title_fontsize="small")
    else:
        ax.legend(
            fontsize="x-small", title=title, title_fontsize="x-small", loc="upper left",
            bbox_to_anchor=(1, 1), ncols=-(-entries // _MOST_ROWS),
        )  # fmt: skip
