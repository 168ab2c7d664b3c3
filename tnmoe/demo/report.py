"""The demo's results as a table, a verdict, JSON and pictures."""

from __future__ import annotations

import json
import platform
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import tnmoe
from tnmoe import plot
from tnmoe.demo.training import Evaluation, Result
from tnmoe.plot.style import rows_size
from tnmoe.system.tables import format_table

# Two-sided 95 % of a normal distribution.
_Z95 = 1.96
# Pictures are sharp on dense screens at this many dots per inch.
_DPI = 200
# Inches of one pair of axes.
_WIDTH, _HEIGHT = 6.4, 4.8


def result_table(results: list[Result]) -> str:
    """Lay out one line per model: its size, its held-out results before and after, its cost."""
    headers = [
        "model",
        "parameters",
        "loss before",
        "loss after",
        "accuracy before",
        "accuracy after",
        "s/step",
        "peak GiB",
    ]
    return format_table(headers, [_row(result) for result in results])


def _row(result: Result) -> list[Any]:
    return [
        result.kind,
        result.parameters,
        f"{result.before.loss:.4f}",
        f"{result.after.loss:.4f}",
        f"{result.before.accuracy:.1%}",
        f"{result.after.accuracy:.1%}",
        f"{result.seconds_per_step:.2f}",
        f"{result.peak_bytes / 2**30:.2f}",
    ]


def compare(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """Return the mean difference of two models' losses per sentence, and its 95 % half-width."""
    differences = (first.losses - second.losses).astype(np.float64)
    half_width = _Z95 * differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean()), float(half_width)


def verdict(results: list[Result]) -> str:
    """Say in words which model is better, and what the comparison does not show."""
    by_kind = {result.kind: result for result in results}
    best = min(results, key=lambda result: result.after.loss)
    mpoe = by_kind["MPOE"]
    lines = [f"Lowest held-out loss: {best.kind} ({best.after.loss:.4f})."]
    for kind in ("dense", "MoE"):
        baseline = by_kind[kind]
        difference, width = compare(mpoe.after, baseline.after)
        if abs(difference) <= width:
            word = f"shows no clear difference from {kind}"
        else:
            word = f"is {'better' if difference < 0 else 'worse'} than {kind}"
        accuracy = mpoe.after.accuracy - baseline.after.accuracy
        lines.append(
            f"MPOE {word}: held-out loss {difference:+.4f} ± {width:.4f}, accuracy "
            f"{100 * accuracy:+.1f} points, with {mpoe.parameters / baseline.parameters:.2f} times "
            "its parameters."
        )
    lines.append(
        "One seed and a short run: ± is the 95 % interval over the held-out sentences and says "
        "nothing about other seeds or longer training."
    )
    return "\n".join(lines)


def report_data(
    options: dict[str, Any],
    parameters: dict[str, Any],
    preservation: dict[str, float],
    results: list[Result],
) -> dict[str, Any]:
    """Gather all findings of the demo as plain data."""
    return {
        "options": options,
        "environment": {
            "tnmoe": tnmoe.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "parameters": parameters,
        "function_preservation": preservation,
        "results": [_result_data(result) for result in results],
        "verdict": verdict(results).splitlines(),
    }


def _result_data(result: Result) -> dict[str, Any]:
    return {
        "model": result.kind,
        "parameters": result.parameters,
        "before": {"loss": _finite(result.before.loss), "accuracy": result.before.accuracy},
        "after": {"loss": _finite(result.after.loss), "accuracy": result.after.accuracy},
        "seconds_per_step": _finite(result.seconds_per_step),
        "peak_bytes": result.peak_bytes,
        "masked_steps": result.masked_steps,
        "training_losses": [_finite(loss) for loss in result.losses],
        "expert_load": None if result.after.expert_counts is None else expert_load(result).tolist(),
    }


def _finite(number: float) -> float | None:
    """Return a number that JSON can hold; None for infinity and NaN, as of a diverged loss."""
    return number if isfinite(number) else None


def expert_load(result: Result) -> np.ndarray:
    """Return the load of experts on held-out sentences, per layer, after fine-tuning."""
    counts = result.after.expert_counts
    assert counts is not None
    return counts / counts.sum(-1, keepdims=True)


def write_report(folder: Path, data: dict[str, Any]) -> None:
    """Write ``report.json``."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def draw_pictures(folder: Path, results: list[Result], spectra: dict[str, np.ndarray]) -> None:
    """Write loss curves, expert loads and Schmidt spectra, where there are any, as PNG files."""
    losses = {result.kind: result.losses for result in results if result.losses}
    if losses:
        figure = _figure(1)
        plot.loss_curves(losses, figure.axes[0])
        figure.savefig(folder / "loss_curves.png", dpi=_DPI)
    mixtures = [result for result in results if result.after.expert_counts is not None]
    layers = len(expert_load(mixtures[0]))
    figure = _figure(len(mixtures), rows_size(layers)[1])
    brightest = max(float(expert_load(result).max()) for result in mixtures)
    for axes, result in zip(figure.axes, mixtures, strict=True):
        plot.expert_load(expert_load(result), axes, brightest)
        axes.set_title(f"{result.kind}: {axes.get_title()}")
    figure.savefig(folder / "expert_load.png", dpi=_DPI)
    if spectra:
        figure = _figure(1)
        axes = plot.schmidt_spectra(spectra, figure.axes[0])
        axes.set_title("Schmidt spectra of the first FFN's up")
        figure.savefig(folder / "schmidt_spectra.png", dpi=_DPI)


def _figure(columns: int, height: float = _HEIGHT) -> Figure:
    """Make a figure with axes in a row, which needs no display."""
    figure = Figure(figsize=(_WIDTH * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, columns)
    return figure
