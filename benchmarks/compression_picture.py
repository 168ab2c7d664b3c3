"""The picture of a compressed mixture: the held-out loss over the bytes of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from tnmoe.plot.style import label_text, line_style


def draw(
    ax: Axes, runs: Sequence[dict[str, Any]], methods: Sequence[str], loss: str = "loss"
) -> None:
    """Draw a line per method: the increase of the loss, a mean over seeds, over bytes.

    Parameters
    ----------
    ax : Axes
    runs : sequence of dict
        The runs of one model, a seed each.
    methods : sequence of str
        A quantised method is a point per number of bits.
    loss : {"loss", "healed"}
    """
    ((_, original),) = _points(runs, "original", loss)
    for index, method in enumerate(methods):
        points = _points(runs, method, loss)
        if points:
            x, y = zip(*((size, value - original) for size, value in points), strict=True)
            ax.plot(
                x,
                y,
                label=label_text(method.replace(" *", "*").replace("*", " 8, 4, 3, 2")),
                **line_style(index, len(x)),
            )
    ax.set_xlabel("bytes of the experts, relative to half precision")
    ax.set_ylabel("increase of the held-out loss" + " after healing" * (loss == "healed"))
    ax.set_xscale("log")
    ax.set_xticks([0.125, 0.25, 0.5, 0.75, 1], ["12.5 %", "25 %", "50 %", "75 %", "100 %"])
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(bottom=-0.001)
    ax.minorticks_off()
    # Every place inside has a curve.
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


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
