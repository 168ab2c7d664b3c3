"""The style of all pictures: colours, markers, axes, labels and legends."""

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

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Markers and lines distinguish series in greyscale. The three cycles differ in length, so that a
# combination repeats only after 252 series.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINE_STYLES = ("-", "--", "-.", ":")
# For marks that are not data: limits, legs of size 1.
GREY = "0.55"

# With more markers than this, a line looks like a chain.
_MARKERS_PER_LINE = 8
# Names longer than the first number drop their common parts, and longer than the second their
# middle.
_LONG_NAME, _MAX_NAME = 20, 40
# A legend with more entries stands beside the axes, in columns of at most this many rows.
_MAX_LEGEND, _MAX_LEGEND_ROWS = 8, 24
# An axis is logarithmic where the largest value exceeds the smallest by this factor.
LOG_AXIS_RATIO = 30
# Inches of a new figure: its width, its usual height, the space around its rows, one row.
_WIDTH, _HEIGHT, _MARGIN, _ROW = 6.4, 4.8, 1.0, 0.45
# Units in which parameters are counted, largest first.
_UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def new_axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """Return the given axes, or the axes of a new figure of a size in inches."""
    if ax is None:
        # Imported late: a caller with axes of its own needs neither pyplot nor its open figures.
        import matplotlib.pyplot as plt

        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InputError(f"ax must be one matplotlib Axes, got {type(ax).__qualname__}")
    return ax


def rows_size(rows: int) -> tuple[float, float]:
    """Return the size in inches of a figure whose height follows its number of rows."""
    return _WIDTH, min(_HEIGHT, _MARGIN + _ROW * rows)


def line_style(index: int, points: int) -> dict[str, Any]:
    """Return the style of the line with an index: a marker on every point, or on a few of many."""
    step = max(1, points // _MARKERS_PER_LINE)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        # Lines on top of each other show their markers side by side.
        "markevery": (index * step // 3 % step, step),
        "markersize": 5,
    }


def label_text(name: object) -> str:
    """Return a name as text that matplotlib draws literally; a long name loses its middle."""
    text = str(name)
    if len(text) > _MAX_NAME:
        half = _MAX_NAME // 2
        text = f"{text[: half - 1]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    # A legend leaves out labels that start with an underscore.
    return f" {text}" if text.startswith("_") else text


def distinct_labels(names: Iterable[object]) -> tuple[list[str], str | None]:
    """Shorten long names to the parts in which they differ, and return the common parts too.

    The second result is None where nothing was cut.

    Examples
    --------
    >>> distinct_labels(["model.layers.0.moe.gate.router", "model.layers.1.moe.gate.router"])
    (['0', '1'], 'model.layers.*.moe.gate.router')
    """
    texts = [str(name) for name in names]
    if len(texts) == 1 or max(map(len, texts)) <= _LONG_NAME:
        return [label_text(text) for text in texts], None
    words = [re.findall(r"[ ,./]|[^ ,./]+", text) or [""] for text in texts]
    start = _common_start(words)
    end = _common_start([parts[start:][::-1] for parts in words])
    own = [label_text("".join(parts[start : len(parts) - end])) for parts in words]
    first = words[0]
    common = "".join([*first[:start], "*", *first[len(first) - end :]])
    return own, label_text(common) if start + end else None


def _common_start(names: Sequence[Sequence[str]]) -> int:
    """Count the words with which all names begin, and leave every name at least one word."""
    columns = zip(*(words[:-1] for words in names), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def integer_ticks(axis: Axis) -> None:
    """Put ticks at whole numbers, as many as fit."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def start_at_zero(ax: Axes) -> None:
    """Let the y-axis start at 0, with space for markers that lie on it."""
    top = max(float(ax.dataLim.y1), 0.0) or 1.0
    ax.set_ylim(-0.03 * top, 1.05 * top)


def decade_below(number: float) -> float:
    """Return the largest power of ten that is not above a positive number."""
    return float(10 ** np.floor(np.log10(number)))


def log_axis_with_zero(ax: Axes, lowest: float, highest: float) -> None:
    """Make the y-axis logarithmic between two positive values, with zero at its lower end."""
    start = decade_below(lowest)
    ax.set_yscale("symlog", linthresh=start, linscale=max(0.5, np.log10(highest / start) / 8))
    ax.set_ylim(bottom=-0.2 * start)


def set_size_axis(ax: Axes, sizes: np.ndarray) -> None:
    """Write sizes readably on the x-axis; make it logarithmic if they differ by a large factor."""
    if sizes.max() > LOG_AXIS_RATIO * sizes.min() > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short_count(size)))


def short_count(count: float) -> str:
    """Write a number of parameters with three digits: 950, 4.72 M, 1.2 B."""
    for unit, name in _UNITS:
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def add_legend(ax: Axes, title: str | None = None) -> None:
    """Add a legend inside the axes, or beside them where many entries would hide the data."""
    entries = len(ax.get_legend_handles_labels()[1])
    if entries <= _MAX_LEGEND:
        ax.legend(fontsize="small", title=title, title_fontsize="small")
    else:
        ax.legend(
            fontsize="x-small", title=title, title_fontsize="x-small", loc="upper left",
            bbox_to_anchor=(1, 1), ncols=-(-entries // _MAX_LEGEND_ROWS),
        )  # fmt: skip
