"""The picture of a compressed mixture: the held-out loss over the bytes of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tnmoe.plot.style import GREY, add_legend, label_text, line_style, new_axes


def draw(runs: Sequence[dict[str, Any]], methods: Sequence[str], loss: str, file: Path) -> None:
    """Draw a line per method, the mean over the seeds of a model, over a share of the bytes.

    Parameters
    ----------
    runs : sequence of dict
        The runs of one model, a seed each.
    methods : sequence of str
        A quantised method is a point per number of bits.
    loss : {"loss", "healed"}
    file : Path
    """
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    ax = new_axes(figure.add_subplot())
    original = _points(runs, "original", loss)
    ax.axhline(original[0][1], color=GREY, linestyle=":", label="original")
    for index, method in enumerate(methods):
        points = _points(runs, method, loss)
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, label=label_text(method), **line_style(index, len(x)))
    top = 2 * max(y for _, y in _points(runs, "SVD, whitened", loss) or original) - original[0][1]
    ax.set_ylim(top=min(ax.get_ylim()[1], top))
    ax.set_xlabel("bytes of the experts, relative to half precision")
    ax.set_ylabel("held-out loss in nats" + " after healing" * (loss == "healed"))
    ax.set_xscale("log")
    ax.set_xticks([0.125, 0.25, 0.5, 0.75, 1], ["12.5 %", "25 %", "50 %", "75 %", "100 %"])
    ax.minorticks_off()
    add_legend(ax)
    figure.savefig(file, metadata={"Date": None})


def _points(runs: Sequence[dict[str, Any]], method: str, loss: str) -> list[tuple[float, float]]:
    """Return bytes and loss, means over seeds, in the order of bytes; some bits have a method each.

    "int*" stands for int8, int4 and so on, as one line.
    """
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for run in runs:
        for case in run["cases"]:
            name = case["method"]
            family = method.endswith("*") and name.startswith(method[:-1]) and "," not in name
            if (name == method or family) and loss in case:
                found.setdefault((name, case["share"]), []).append((case["bytes"], case[loss]))
    return sorted((fmean(x for x, _ in each), fmean(y for _, y in each)) for each in found.values())
