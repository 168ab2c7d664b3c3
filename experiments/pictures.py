"""Pictures of a setting's results, without a display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.settings import Setting
from experiments.statistics import chosen, mean_and_spread, values
from tnmoe import plot
from tnmoe.plot.style import COLORS, GREY, MARKERS, rows_size

_EXPERTS = (2, 4, 8, 16, 32)


def _by_experts(method: str) -> tuple[str, ...]:
    """Return a method's names for all numbers of experts; 8, the default, has no suffix."""
    return tuple(method if count == 8 else f"{method}-e{count}" for count in _EXPERTS)


# Kinds of methods, by the first word of their names.
_KINDS = {
    "dense": "dense model",
    "moe": "ordinary mixture",
    "mpoe": "MPOE, interleaved",
    "split": "MPOE, split",
}
_LOOKS: dict[str, dict[str, Any]] = {
    kind: {"color": color, "marker": marker}
    for kind, color, marker in zip(_KINDS, ("black", *COLORS), MARKERS, strict=False)
}
# The methods of every kind that one line connects, smallest first; then those with top-2.
_LINES = {
    "dense": ("dense", "dense-wide"),
    "moe": _by_experts("moe"),
    "mpoe": _by_experts("mpoe"),
    "split": _by_experts("split-64"),
}
_TWO_PER_TOKEN = {"moe": "moe-top2", "mpoe": "mpoe-top2", "split": "split-64-top2"}
_MASKS = {0.0: "mpoe", 0.25: "mpoe-mask-0.25", 0.5: "mpoe-mask-0.5", 0.9: "mpoe-mask-0.9",
          1.0: "mpoe-frozen"}  # fmt: skip
# Inches: width; usual and least height; margins around a list of methods, and height of its row.
_WIDTH, _HEIGHT, _LOWEST, _AROUND, _ROW = 7.0, 5.2, 2.4, 1.2, 0.19
# The axis is logarithmic if the largest number of parameters exceeds the smallest by this factor.
_FAR_APART = 5


@dataclass(frozen=True)
class Picture:
    """A picture's file, and its description in words."""

    path: Path
    alt: str


def draw(setting: Setting, data: dict[str, Any], target: Path) -> list[Picture]:
    """Write the pictures for which there are results, as self-contained SVG."""
    drawings: dict[str, Callable[[Setting, list], tuple[Figure, str] | None]] = {
        "methods": _methods,
        "parameters": _against("parameters", "parameters in total"),
        "active": _against("active_parameters", "active parameters per token"),
        "mask": _mask,
        "load": _load,
    }
    written = []
    for name, drawing in drawings.items():
        drawn = drawing(setting, data["results"])
        if drawn is not None:
            figure, alt = drawn
            path = target / f"{setting.name}-{name}.svg"
            with matplotlib.rc_context({"svg.hashsalt": path.stem}):
                figure.savefig(path, metadata={"Date": None})
            written.append(Picture(path, alt))
    return written


def _new(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _methods(setting: Setting, results: list) -> tuple[Figure, str] | None:
    """Draw all methods in rows, the best at the top, with their sizes."""
    points = {method: _point(setting, results, method, "parameters") for method in setting.methods}
    found = {method: point for method, point in points.items() if point and isfinite(point[1])}
    if not found:
        return None
    higher_is_better = setting.metric == "accuracy"
    order = sorted(found, key=lambda method: found[method][1], reverse=higher_is_better)
    figure, ax = _new(max(_LOWEST, _AROUND + _ROW * len(order)))
    for row, method in enumerate(order):
        _, mean, spread = found[method]
        look = _LOOKS.get(method.partition("-")[0], {"color": GREY, "marker": "o"})
        ax.errorbar(mean, row, xerr=spread, markersize=4, capsize=2, **look)
    if "dense" in found:
        ax.axvline(found["dense"][1], color=GREY, linestyle=":", zorder=0)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set(xlabel=f"held-out {setting.metric}", title=setting.title)
    sizes = ax.secondary_yaxis("right")
    short = EngFormatter(places=1)
    labels = [short(found[method][0]) for method in order]
    sizes.set_yticks(range(len(order)), labels, fontsize=8)
    sizes.set_ylabel("parameters in total")
    ends = " to ".join(f"{found[each][1]:.3f} ({each})" for each in (order[0], order[-1]))
    return figure, (
        f"Held-out {setting.metric} of {len(order)} methods with its spread over seeds, best "
        f"first, from {ends}; the table has all figures."
    )


def _against(size: str, label: str) -> Callable[[Setting, list], tuple[Figure, str] | None]:
    """Return a drawing of results against size: a line per kind, points for all other methods."""

    def drawing(setting: Setting, results: list) -> tuple[Figure, str] | None:
        points = {method: _point(setting, results, method, size) for method in setting.methods}
        left = {method: point for method, point in points.items() if point is not None}
        if not left:
            return None
        figure, ax = _new()
        _scale(ax, [point[0] for point in left.values()])
        drawn = []
        for kind, title in _KINDS.items():
            line = [left.pop(method) for method in _LINES[kind] if method in left]
            if line:
                drawn.append(title)
                _draw(ax, line, label=title, **_LOOKS[kind])
            two = left.pop(_TWO_PER_TOKEN.get(kind, ""), None)
            if two is not None:
                _draw(
                    ax, [two], label=f"{title}, two experts per token", mfc="white", **_LOOKS[kind]
                )
        if others := [point for method, point in left.items() if not method.endswith("fresh")]:
            look = {"color": GREY, "marker": ".", "linestyle": "none", "elinewidth": 0.8}
            _draw(ax, others, label="other methods", zorder=1, **look)
        ax.set(xlabel=label, ylabel=f"held-out {setting.metric}", title=setting.title)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        return figure, (
            f"Held-out {setting.metric} against {label}, with its spread over seeds. Lines: "
            f"{'; '.join(drawn)}. The table has all figures."
        )

    return drawing


def _draw(ax: Axes, points: Sequence[tuple[float, float, float]], **look: Any) -> None:
    x, y, spread = zip(*points, strict=True)
    ax.errorbar(x, y, spread, capsize=3, **look)


def _scale(ax: Axes, sizes: Sequence[float]) -> None:
    """Choose few enough ticks that their labels stay readable."""
    if max(sizes) > _FAR_APART * min(sizes):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(EngFormatter())


def _point(
    setting: Setting, results: list, method: str, size: str
) -> tuple[float, float, float] | None:
    """Return size, mean result and its spread."""
    runs = chosen(results, method)
    if not runs:
        return None
    mean, spread = mean_and_spread(list(values(results, method, setting.metric).values()))
    return float(runs[0][size]), mean, spread or 0.0


def _mask(setting: Setting, results: list) -> tuple[Figure, str] | None:
    """Draw results against the mask's probability."""
    points = {
        probability: _point(setting, results, method, "parameters")
        for probability, method in _MASKS.items()
    }
    found = {probability: point for probability, point in points.items() if point is not None}
    if len(found) < 3:
        return None
    means, spreads = zip(*((mean, spread) for _, mean, spread in found.values()), strict=True)
    figure, ax = _new(_HEIGHT - 1)
    ax.errorbar(list(found), means, spreads, capsize=3, **_LOOKS["mpoe"])
    ax.set(
        xlabel="mask probability (1: frozen)", ylabel=f"held-out {setting.metric}",
        title=setting.title,
    )  # fmt: skip
    figures = ", ".join(
        f"{mean:.3f} at {probability:g}" for probability, mean in zip(found, means, strict=True)
    )
    return figure, f"Held-out {setting.metric} against the mask's probability: {figures}."


def _load(setting: Setting, results: list) -> tuple[Figure, str] | None:
    """Draw the shares of tokens of every layer and expert of MPOE."""
    runs: Sequence[Any] = chosen(results, "mpoe")
    if not runs:
        return None
    shares = runs[0]["load"]["shares"]
    figure, ax = _new(rows_size(len(shares))[1])
    plot.expert_load(shares, ax)
    ax.set_title(f"MPOE: {ax.get_title()[0].lower()}{ax.get_title()[1:]}")
    every = [share for row in shares for share in row]
    return figure, (
        f"Share of tokens of every expert in {len(shares)} layers of MPOE, from {min(every):.0%} "
        f"to {max(every):.0%}; balanced shares are {1 / len(shares[0]):.1%}."
    )
