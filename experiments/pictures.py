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
    """A method with all numbers of experts; 8 is the settings' own."""
    return tuple(method if count == 8 else f"{method}-e{count}" for count in _EXPERTS)


# Kinds of methods, which are the first words of their names.
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
# Of every kind the methods of one line, the smallest first, and the one of two experts per token.
_LINES = {
    "dense": ("dense", "dense-wide"),
    "moe": _by_experts("moe"),
    "mpoe": _by_experts("mpoe"),
    "split": _by_experts("split-64"),
}
_TWO_PER_TOKEN = {"moe": "moe-top2", "mpoe": "mpoe-top2", "split": "split-64-top2"}
_MASKS = {0.0: "mpoe", 0.25: "mpoe-mask-0.25", 0.5: "mpoe-mask-0.5", 0.9: "mpoe-mask-0.9",
          1.0: "mpoe-frozen"}  # fmt: skip
# Inches: width of pictures, height of most and least height, what is around methods, and a row.
_WIDTH, _HEIGHT, _LOWEST, _AROUND, _ROW = 7.0, 5.2, 2.4, 1.2, 0.19
# From this ratio of the largest to the smallest on, numbers of parameters have a logarithmic axis.
_FAR_APART = 5


@dataclass(frozen=True)
class Picture:
    """A file, and what it shows in words."""

    path: Path
    alt: str


def draw(setting: Setting, data: dict[str, Any], target: Path) -> list[Picture]:
    """Write the pictures for which there are results, as SVG that depends on nothing else."""
    drawings: dict[str, Callable[[Setting, list], tuple[Figure, str] | None]] = {
        "methods": _methods,
        "parameters": _against("parameters", "parameters in total"),
        "active": _against("active_parameters", "parameters that a token meets"),
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
    """All methods in rows, the best at the top, with their sizes."""
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
        f"first, from {ends}; all figures are in the table."
    )


def _against(size: str, label: str) -> Callable[[Setting, list], tuple[Figure, str] | None]:
    """Results against a number of parameters: lines over E, and all other methods as points."""

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
            f"Held-out {setting.metric} against {label}, with its spread over seeds, of "
            f"{', '.join(drawn)}; all figures are in the table."
        )

    return drawing


def _draw(ax: Axes, points: Sequence[tuple[float, float, float]], **look: Any) -> None:
    x, y, spread = zip(*points, strict=True)
    ax.errorbar(x, y, spread, capsize=3, **look)


def _scale(ax: Axes, sizes: Sequence[float]) -> None:
    """Readable numbers of parameters, no more than have room."""
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
    """Size, mean and spread."""
    runs = chosen(results, method)
    if not runs:
        return None
    mean, spread = mean_and_spread(list(values(results, method, setting.metric).values()))
    return float(runs[0][size]), mean, spread or 0.0


def _mask(setting: Setting, results: list) -> tuple[Figure, str] | None:
    """Results against the mask's probability."""
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
    told = ", ".join(
        f"{mean:.3f} at {probability:g}" for probability, mean in zip(found, means, strict=True)
    )
    return figure, f"Held-out {setting.metric} against the mask's probability: {told}."


def _load(setting: Setting, results: list) -> tuple[Figure, str] | None:
    """Shares of tokens per layer and expert of MPOE."""
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
        f"to {max(every):.0%}; balanced would be {1 / len(shares[0]):.1%}."
    )
