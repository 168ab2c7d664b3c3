"""Pictures of a setting's results, without a display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.settings import Setting
from experiments.statistics import chosen, mean_and_spread, values
from tnmoe import plot
from tnmoe.plot.style import COLORS, MARKERS

# Methods of one line each, by their numbers of experts; 8 is the settings' own.
_BY_EXPERTS = {"ordinary mixture": "moe", "MPOE, interleaved": "mpoe", "MPOE, split": "split-64"}
_EXPERTS = (2, 4, 8, 16, 32)
# Width and height of a method's name, as shares of the axes.
_NAME = 0.16, 0.025
_MASKS = {0.0: "mpoe", 0.25: "mpoe-mask-0.25", 0.5: "mpoe-mask-0.5", 0.9: "mpoe-mask-0.9",
          1.0: "mpoe-frozen"}  # fmt: skip


def draw(setting: Setting, data: dict[str, Any], target: Path) -> list[Path]:
    """Write the pictures for which there are results; their paths."""
    drawings: dict[str, Callable[[Axes, Setting, list], bool]] = {
        "parameters": _against("parameters", "parameters in total"),
        "active": _against("active_parameters", "parameters that a token meets"),
        "mask": _mask,
        "load": _load,
    }
    written = []
    for name, drawing in drawings.items():
        figure = Figure(figsize=(7, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        if drawing(figure.subplots(), setting, data["results"]):
            path = target / f"{setting.name}-{name}.png"
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def _against(size: str, label: str) -> Callable[[Axes, Setting, list], bool]:
    """Results against a number of parameters: lines over E, and all other methods as points."""

    def drawing(ax: Axes, setting: Setting, results: list) -> bool:
        drawn: set[str] = set()
        for (title, kind), colour, marker in zip(
            _BY_EXPERTS.items(), COLORS, MARKERS, strict=False
        ):
            names = [kind if count == 8 else f"{kind}-e{count}" for count in _EXPERTS]
            points = [_point(setting, results, name, size) for name in names]
            found = [each for each in points if each is not None]
            if found:
                x, y, spread = zip(*found, strict=True)
                ax.errorbar(x, y, spread, color=colour, marker=marker, capsize=3, label=title)
            drawn |= set(names)
        places: dict[str, tuple[float, float]] = {}
        for method in setting.methods:
            point = None if method in drawn else _point(setting, results, method, size)
            if point is not None and not method.endswith("fresh"):
                ax.errorbar(*point, color="0.45", marker=".", capsize=2, linestyle="none")
                places[method] = point[:2]
        ax.set(xscale="log", xlabel=label, ylabel=f"held-out {setting.metric}", title=setting.title)
        _name(ax, places)
        ax.legend(fontsize=8)
        return bool(results)

    return drawing


def _name(ax: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Names beside points, moved upwards where they would lie on each other."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        height = y
        for other, at in taken:
            near = abs(log(x / other)) < _NAME[0] * log(right / left)
            if near and abs(height - at) < _NAME[1] * (high - low):
                height = at + _NAME[1] * (high - low)
        taken = sorted([*taken, (x, height)], key=lambda place: place[1])
        beside = x * (right / left) ** 0.015
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(name, (x, y), (beside, height), size=6.5, va="center", arrowprops=line)


def _point(
    setting: Setting, results: list, method: str, size: str
) -> tuple[float, float, float] | None:
    """Size, mean and spread."""
    runs = chosen(results, method)
    if not runs:
        return None
    mean, spread = mean_and_spread(list(values(results, method, setting.metric).values()))
    return float(runs[0][size]), mean, spread or 0.0


def _mask(ax: Axes, setting: Setting, results: list) -> bool:
    """Results against the mask's probability."""
    points = {
        probability: _point(setting, results, method, "parameters")
        for probability, method in _MASKS.items()
    }
    found = {probability: point for probability, point in points.items() if point is not None}
    if len(found) < 3:
        return False
    means, spreads = zip(*((mean, spread) for _, mean, spread in found.values()), strict=True)
    ax.errorbar(list(found), means, spreads, color=COLORS[1], marker="s", capsize=3)
    ax.set(
        xlabel="mask probability (1: frozen)", ylabel=f"held-out {setting.metric}",
        title=setting.title,
    )  # fmt: skip
    return True


def _load(ax: Axes, setting: Setting, results: list) -> bool:
    """Shares of tokens per layer and expert of MPOE."""
    runs: Sequence[Any] = chosen(results, "mpoe")
    if not runs:
        return False
    plot.expert_load(runs[0]["load"]["shares"], ax)
    ax.set_title(f"{setting.title}: MPOE's experts")
    return True
