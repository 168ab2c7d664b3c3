"""Mixtures made smaller: what tnmoe's structures lose, beside published methods and quantisation.

    python benchmarks/compression.py --work FOLDER --text a.txt b.txt c.txt
    python benchmarks/compression.py --work FOLDER --models small --seeds 0 --heal 0   # no healing
    python benchmarks/compression.py --work FOLDER --heal-methods 'tnmoe*' 'SVD*'  # these heal
    python benchmarks/compression.py --work FOLDER --heal-shares 1 0.5             # only there
    python benchmarks/compression.py --work FOLDER --methods 'tnmoe*' 'int4' --shares 0.5
    python benchmarks/compression.py --work FOLDER --tiny       # a model of two layers, a minute
    python benchmarks/compression.py --work FOLDER --text a.txt --models smollm2 --seeds 0 --heal 0

The script trains its models, keeps them in FOLDER and goes on where it stopped. Every text is one
domain; the source of Python's library is another. ``smollm2`` starts from real weights, the other
models from random ones. The script then compresses the experts, measures the held-out loss, and
measures it again after healing: a short training, equal for all methods.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compression_calibration import Layer, calibrated
from compression_forms import Experts
from compression_measures import errors, heal, held_out, probe, with_experts
from compression_methods import METHODS, QUANTISED, Method, unchanged
from compression_models import SIZES, Budget, Data, Size, prepare, trained
from compression_smollm2 import REDRAWN, SMOLLM2
from machine import environment, hardware_slug, set_threads
from stored import kept, matches, slug
from transformers import MixtralForCausalLM

from tnmoe.system.tables import format_table

MODELS: dict[str, Size] = {**SIZES, "smollm2": SMOLLM2, "smollm2-redrawn": REDRAWN}
SHARES = (0.8, 0.75, 0.6, 0.5, 0.25)


def main() -> None:
    """Train, compress, measure; write and print the results."""
    options = parse_arguments()
    threads = set_threads()
    report: dict[str, Any] = {
        "environment": environment(("tnmoe", "transformers", "tensorly"), "cpu", threads),
        "dtype": "float32",
        "models": [],
    }
    for name in options.models:
        for seed in options.seeds:
            report["models"].append(run_model(name, seed, options))
    output = options.output or default_output(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="texts, a domain each")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["small", "medium"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="numbers to keep")
    parser.add_argument("--methods", nargs="*", default=["*"], help="patterns of their names")
    parser.add_argument("--heal", type=int, help="steps of healing; by default the model's")
    parser.add_argument("--heal-shares", nargs="*", type=float, help="shares that heal, or all")
    parser.add_argument("--heal-methods", nargs="*", default=["*"], help="methods that heal")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, a minute")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.seeds = ["tiny"], [0]
        options.heal = 2 if options.heal is None else min(options.heal, 2)
    return options


def default_output(options: argparse.Namespace) -> Path:
    """Return the result file of this machine."""
    name = f"{'-'.join(options.models)}-{hardware_slug('cpu')}.json"
    return Path(__file__).parent / "results" / "compression" / name


def run_model(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model, and measure all cases."""
    cases = options.work / f"{name}-seed{seed}"
    cases.mkdir(parents=True, exist_ok=True)
    subject = Subject.of(name, seed, options, cases / "calibration.pt")
    probed = kept(cases / "probe.json", subject.probe)
    print(probe_text(name, seed, probed), flush=True)
    rows = []
    for method, share in selected(options.methods, options.shares):
        steps = subject.budget.healing if heals(method, share, options) else 0
        file = cases / f"{slug(method)}-{round(100 * share)}-heal{steps}.json"
        rows.append(kept(file, partial(subject.measure, method, share, steps)))
        print("  ".join(cells(rows[-1])), flush=True)
    print(table(rows))
    return {
        "model": name, "seed": seed, "size": asdict(subject.size),
        "budget": asdict(subject.budget), "probe": probed, "cases": rows,
    }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A trained model, and what the calibration shows of it."""

    model: MixtralForCausalLM
    layers: list[Layer]
    size: Size
    budget: Budget
    data: Data
    seed: int

    @classmethod
    def of(cls, name: str, seed: int, options: argparse.Namespace, calibration: Path) -> Subject:
        """Train the model of a seed and calibrate it, or load what an earlier run stored."""
        size = MODELS[name]
        budget = size.budget
        if options.heal is not None:
            budget = replace(budget, healing=options.heal)
        data = prepare(options.work, options.text, size)
        model = trained(size, name, seed, data, options.work)
        windows = data.windows(size, budget.calibration, held_out=False)
        layers = calibrated(calibration, model, windows, budget.batch)
        return cls(model, layers, size, budget, data, seed)

    @property
    def windows(self) -> torch.Tensor:
        """Windows that measure the loss."""
        return self.data.windows(self.size, self.budget.held_out)

    def probe(self) -> dict[str, Any]:
        """Show that experts differ, on some of the windows."""
        windows = self.windows[:: self.budget.probe_every]
        return probe(self.model, self.layers, windows, self.budget.removed)

    def measure(self, method: str, share: float, steps: int) -> dict[str, Any]:
        """Compress the model; return sizes, errors and losses, also after steps of healing."""
        start = time.perf_counter()
        compressed = method_of(method)(self.layers, share)
        seconds = time.perf_counter() - start
        full = sum(layer.numbers for layer in self.layers)
        row: dict[str, Any] = {
            "method": method,
            "share": share,
            "numbers": sum(experts.count for experts in compressed) / full,
            "bytes": sum(experts.bytes for experts in compressed) / (2 * full),
            "seconds": seconds,
            **errors(self.layers, compressed),
            "loss": held_out(with_experts(self.model, compressed), self.windows),
        }
        if steps:
            row["by rate"] = {
                str(rate): self.healed(compressed, steps, rate) for rate in self.budget.rates
            }
            row["healed"] = min(row["by rate"].values())
        return row

    def healed(self, compressed: list[Experts], steps: int, rate: float) -> float:
        """Return the held-out loss after steps of healing."""
        changed = with_experts(self.model, compressed)
        heal(changed, self.size, self.data, steps, rate, self.seed)
        return held_out(changed, self.windows)


def selected(patterns: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
    """Return the methods whose names match a pattern, with the shares that they run at."""
    everything = {name: tuple(shares) for name in METHODS}
    everything |= {name: own for name, (_, own) in QUANTISED.items()}
    chosen = [
        (name, share)
        for name, own in everything.items()
        if matches(name, patterns)
        for share in own
    ]
    return [("original", 1.0), *chosen]


def heals(method: str, share: float, options: argparse.Namespace) -> bool:
    """Return whether a case trains after the compression."""
    if options.heal_shares is not None and share not in options.heal_shares:
        return False
    return method == "original" or matches(method, options.heal_methods)


def method_of(name: str) -> Method:
    """Return the method of a name."""
    if name == "original":
        return unchanged
    return METHODS[name] if name in METHODS else QUANTISED[name][0]


def probe_text(name: str, seed: int, found: dict[str, Any]) -> str:
    """Describe how experts differ."""
    experts = [each for layer in found["without one"] for each in layer]
    removed = [each for each in experts if each is not None]
    loads = [each for layer in found["load"] for each in layer]
    distance = ", ".join(f"{key} {value:.3f}" for key, value in found["distance"].items())
    return (
        f"{name}, seed {seed}: held-out loss {found['loss']:.4f}; distance from the mean "
        f"{distance};\nloads {min(loads):.3f} to {max(loads):.3f}; without one expert "
        f"({len(removed)} of {len(experts)} tried) "
        f"{min(removed):+.4f} to {max(removed):+.4f}, mean {sum(removed) / len(removed):+.4f}; "
        f"random routing {found['random routing']:+.4f}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """Return the columns of a case."""
    return [
        f"{row['method']}", f"{row['share']:.0%}", f"{row['numbers']:.1%}", f"{row['bytes']:.1%}",
        *("n/a" if row[key] is None else f"{row[key]:.3f}" for key in ("weights", "activations")),
        f"{row['loss']:.4f}", f"{row['healed']:.4f}" if "healed" in row else "",
        f"{row['seconds']:.1f}",
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out all cases of a model."""
    headers = [
        "method",
        "asked",
        "numbers",
        "bytes",
        "weights",
        "activations",
        "loss",
        "healed",
        "s",
    ]
    return format_table(headers, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
