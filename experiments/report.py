"""Tables, pictures and JSON made from the existing results."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

import tnmoe
from experiments import pictures
from experiments.claims import Verdict, judge
from experiments.folder import SettingFolder, read, write
from experiments.methods import METHODS
from experiments.settings import Setting
from experiments.statistics import chosen, difference, mean_and_spread, values

_COLUMNS = (
    "method", "rate", "parameters", "active", "{metric}", "− dense, seed by seed",
    "step / dense", "memory / dense", "evenness", "largest share", "drift shared, owned",
)  # fmt: skip


def write_report(folders: Sequence[SettingFolder], target: Path, device: str) -> list[Path]:
    """Write a page, pictures and a JSON file per setting, and a page of claims.

    Parameters
    ----------
    folders : sequence of SettingFolder
        Folders without results are skipped.
    target : Path
        Folder of the report; made if it does not exist.
    device : str
        Torch device of the runs, which the pages name.

    Returns
    -------
    list of Path
        The files that were written.
    """
    target.mkdir(parents=True, exist_ok=True)
    written, results = [], {}
    for folder in folders:
        found = folder.results()
        if not found:
            continue
        setting = folder.setting
        data = _data(folder, found, device)
        results[setting.name] = found
        write(target / f"{setting.name}.json", data)
        drawn = pictures.draw(setting, data, target)
        text = target / f"{setting.name}.md"
        text.write_text(page(setting, data, drawn), encoding="utf-8")
        written += [target / f"{setting.name}.json", text, *(each.path for each in drawn)]
    if results:
        claims = target / "claims.md"
        claims.write_text(_claims(judge(results)), encoding="utf-8")
        written.append(claims)
    return written


def environment(device: str) -> dict[str, Any]:
    """Describe the machine and the versions that produced the results."""
    cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "tnmoe": tnmoe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _data(folder: SettingFolder, results: list[dict], device: str) -> dict[str, Any]:
    setting = folder.setting
    costs = {
        method: read(folder.cost(method))
        for method in setting.methods
        if folder.cost(method).exists()
    }
    pretraining = [
        read(folder.pretrained(seed).with_suffix(".json"))
        for seed in range(setting.seeds)
        if setting.pretraining is not None and folder.is_pretrained(seed)
    ]
    return {
        "setting": setting.name,
        "title": setting.title,
        "metric": setting.metric,
        "steps": setting.stage.steps,
        "learning_rates": list(setting.stage.learning_rates),
        "mixture": dict(setting.mixture),
        "environment": environment(device),
        "data": folder.describe_data(),
        "pretraining": pretraining,
        "results": results,
        "costs": costs,
    }


def rows(setting: Setting, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for every method with results, in the setting's order."""
    results, costs = data["results"], data["costs"]
    dense = chosen(results, "dense")
    table = []
    for method in setting.methods:
        if not (runs := chosen(results, method)):
            continue
        first = runs[0]
        memory = first["peak_bytes"] / dense[0]["peak_bytes"] if dense else None
        drift = first["drift"]
        table.append(
            {
                "method": method,
                "meaning": METHODS[method].meaning,
                "rate": first["learning_rate"],
                "parameters": first["parameters"],
                "active": first["active_parameters"],
                "seeds": len(runs),
                "result": mean_and_spread(list(values(results, method, setting.metric).values())),
                "difference": difference(results, method, "dense", setting.metric),
                "time_ratio": 1.0 if method == "dense" else costs.get(method, {}).get("time_ratio"),
                "memory_ratio": memory,
                "evenness": _mean([each["load"].get("evenness") for each in runs]),
                "largest_share": _mean([each["load"].get("largest_share") for each in runs]),
                "drift": (drift.get("shared"), drift.get("owned")),
            }
        )
    return table


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [each for each in numbers if each is not None]
    return fmean(known) if known else None


def page(setting: Setting, data: dict[str, Any], drawn: Sequence[pictures.Picture]) -> str:
    """Return a setting's page in Markdown."""
    pictures_ = "\n\n".join(f"![{each.alt}]({each.path.name})" for each in drawn)
    return (
        "\n\n".join(
            [
                f"# {setting.title}",
                _about(setting, data),
                _table(setting, rows(setting, data)),
                _legend(setting),
                pictures_,
            ]
        ).rstrip()
        + "\n"
    )


def _about(setting: Setting, data: dict[str, Any]) -> str:
    texts = []
    for stage, description in data["data"].items():
        source = description["text"]
        sizes = ", ".join(f"{name} {size}" for name, size in _sizes(description).items())
        texts.append(
            f"- {stage}: {source['title']} ({source['licence']}, "
            f"{source['bytes']:,} bytes); {sizes}"
        )
    machine = data["environment"]
    lines = [
        f"Every method trains for {data['steps']} steps and tries the learning rates "
        f"{', '.join(f'{rate:g}' for rate in data['learning_rates'])} "
        f"with {_tuning_seeds(setting)}. "
        "The rate with the lowest validation loss is used for all seeds. "
        f"{machine['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, tnmoe {machine['tnmoe']}, "
        f"{machine['date'][:10]}.",
        "\n".join(texts),
    ]
    if data["mixture"]:
        settings = ", ".join(f"`{name}={value!r}`" for name, value in data["mixture"].items())
        lines.append(f"Settings of every mixture: {settings}.")
    return "\n\n".join(lines)


def _tuning_seeds(setting: Setting) -> str:
    if setting.tuning_seeds == 1:
        return f"the first of {setting.seeds} seeds"
    return f"the first {setting.tuning_seeds} of {setting.seeds} seeds"


def _sizes(description: dict[str, Any]) -> dict[str, str]:
    return {
        name: " and ".join(f"{count:,} {unit}" for unit, count in size.items())
        for name, size in description["sizes"].items()
    }


def _table(setting: Setting, table: Sequence[dict[str, Any]]) -> str:
    headers = [name.format(metric=setting.metric) for name in _COLUMNS]
    lines = [
        headers,
        ["---"] * len(headers),
        *([_cell(each) for each in _cells(row)] for row in table),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: dict[str, Any]) -> list[Any]:
    mean, spread = row["result"]
    shared, owned = row["drift"]
    return [
        f"`{row['method']}`: {row['meaning']}",
        f"{row['rate']:g}",
        f"{row['parameters']:,}",
        f"{row['active']:,}",
        f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
        None if row["method"] == "dense" else row["difference"],
        row["time_ratio"],
        row["memory_ratio"],
        row["evenness"],
        row["largest_share"],
        None if owned is None else f"{'–' if shared is None else f'{shared:.3f}'}, {owned:.3f}",
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _legend(setting: Setting) -> str:
    return (
        f"*{setting.metric}* is the held-out test result, mean ± standard deviation over seeds. "
        "The next column is the difference from the dense model seed by seed: mean ± half-width "
        "of the 95 % interval of Student's t. *active* counts the parameters that one token uses. "
        "*step / dense* compares the median times of a training step, measured in turn with the "
        "dense model in one process. *memory / dense* compares the peak memory of whole runs. "
        "*evenness* is the entropy of the experts' shares of tokens divided by that of equal "
        "shares. *largest share* is the largest share of any expert in any layer. *drift* is how "
        "far cores moved relative to their norm, first for the cores that experts share and then "
        "for the cores that each expert owns."
    )


def _claims(verdicts: Sequence[Verdict]) -> str:
    lines = [
        "| claim | setting | verdict | figures |",
        "| --- | --- | --- | --- |",
        *(f"| {v.claim} | {v.setting} | **{v.verdict}** | {v.figures} |" for v in verdicts),
    ]
    return "# Claims and verdicts\n\n" + "\n".join(lines) + "\n"
