"""Tables of the benchmark of adapters: held-out losses, their differences to LoRA, and costs.

python benchmarks/adapters_tables.py benchmarks/results/adapters/smollm2-….json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from compression_tables import markdown

from experiments.statistics import difference, values

REFERENCE = "LoRA"


def main() -> None:
    """Print the tables of result files."""
    for file in sys.argv[1:]:
        report = json.loads(Path(file).read_text())
        print("\n\n".join([title(report), markdown(*table(report)), *notes(report)]), end="\n\n")


def title(report: dict[str, Any]) -> str:
    """Say what was measured, and the losses of the base model."""
    before = ", ".join(f"{key} {_number(value)}" for key, value in report["before"].items())
    return (
        f"{report['model']}, {report['steps']} steps, {len(report['seeds'])} seeds, at most "
        f"{report['budget']:,} trained parameters. Before training: {before}."
    )


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headers, and a row per method; differences are paired by seed, with 95 % of t."""
    metrics = [key for key in report["before"] if key != "loss"]
    headers = [
        "method", "size", "parameters", "bytes", "rate", *metrics, "mean loss", "− LoRA",
        "step / LoRA", "MiB", "routing distance",
    ]  # fmt: skip
    rows = [
        _row(name, about, report, metrics)
        for name, about in report["methods"].items()
        if "note" not in about
    ]
    return headers, rows


def notes(report: dict[str, Any]) -> list[str]:
    """Return what learned routing changes, and why methods have no figures."""
    found = []
    for name in report["methods"]:
        control = f"{name}, random routing"
        if learned := difference(report["results"], name, control, "loss"):
            found.append(f"{name} − {control}: {learned}.")
    abouts = report["methods"].items()
    return found + [f"{name}: {about['note']}." for name, about in abouts if "note" in about]


def _row(name: str, about: dict[str, Any], report: dict[str, Any], metrics: list[str]) -> list[str]:
    results = report["results"]
    own = [each for each in results if each["method"] == name]
    distances = [each["routing distance"] for each in own]
    return [
        name,
        f"{about['unit']} {about['size']}",
        f"{about['trained']:,}",
        "" if about["bytes"] is None else f"{about['bytes']:,}",
        _rate(own[0]["learning_rate"], report["rates"]),
        *(_number(_mean(results, name, metric)) for metric in [*metrics, "loss"]),
        "" if name == REFERENCE else str(difference(results, name, REFERENCE, "loss")),
        f"{about['seconds'] / about['LoRA seconds']:.2f}",
        f"{about['step bytes'] / 2**20:.0f}",
        "" if None in distances else f"{fmean(distances):.2f}",
    ]


def _rate(best: float, tried: list[float]) -> str:
    """Describe the best rate; a better one may lie beyond those that were tried."""
    ends = {min(tried): " (smallest)", max(tried): " (largest)"} if len(tried) > 1 else {}
    return f"{best:g}{ends.get(best, '')}"


def _mean(results: list[dict[str, Any]], name: str, metric: str) -> float:
    return fmean(values(results, name, metric).values())


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
