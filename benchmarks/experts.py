"""Layers of experts side by side: forward, and forward with backward, of the same tokens.

    python benchmarks/experts.py --quick
    python benchmarks/experts.py --experts 8 32 --top-k 1 2 --tokens 512 4096
    python benchmarks/experts.py --layers 'dense*' 'tnmoe*' grouped_mm --modes train
    python benchmarks/experts.py --check-plan      # every route beside the planned one
    python benchmarks/experts.py --building        # building matrices beside the machine's rate
    python benchmarks/experts.py --peak --tokens 512   # memory of a training step

Layers take turns within a run; machine.py describes a turn. Medians are taken over turns.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from expert_layers import (
    DTYPES,
    build_on,
    inputs_on,
    makers,
    read_bytes,
    weight_bytes,
)
from expert_routes import building, check_plan
from library import OnTorch, Unsupported
from machine import (
    PeakMemory,
    environment,
    gemm_rate,
    hardware_slug,
    keep_freed_memory,
    limit_memory,
    set_threads,
    take_turns,
    timed,
)

from tnmoe.errors import InputError
from tnmoe.nn import weight_cache
from tnmoe.nn.compute.calibrate import calibrate
from tnmoe.system.tables import format_table

PACKAGES = ("tnmoe", "transformers", "torchTT", "tensorly-torch")
# Ordinary mixtures: the fastest of them is the best MoE.
BASELINES = ("Switch loop", "eager", "batched_mm", "grouped_mm")
# A layer that fails or lacks a case stays in the table with the reason.
REASONS = (Unsupported, InputError, RuntimeError, MemoryError, ImportError)
# A longer first call needs no second one to tell how long calls take.
LONG_S = 1.0
# Even longer calls are not repeated. In training, transformers' eager experts take minutes.
HOPELESS_S = 30.0


def main() -> None:
    """Measure all cases, and write and print the results."""
    options = parse_arguments()
    limit_memory(options.memory, options.device)
    keep_freed_memory()
    # All layers of a case exist at once, and each must be able to cache its matrices.
    weight_cache.limit = 8 * 2**30
    threads = set_threads()
    library = OnTorch(options.device)
    report: dict[str, Any] = {
        "environment": environment(PACKAGES, options.device, threads),
        "dtype": DTYPES[options.device],
        "gemm flops/s": gemm_rate(DTYPES[options.device], options.device),
        "cases": [],
    }
    output = options.output or default_output(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(report["environment"], indent=1))
    report["rates"] = asdict(calibrate(options.device, store=False))
    print(report["rates"])
    measure = check_plan if options.check_plan else peak if options.peak else compare
    if options.building:
        report["building"] = building(library, report["gemm flops/s"])
    else:
        for case in cases(options):
            report["cases"].append(case | measure(case, library, options))
            output.write_text(json.dumps(report, indent=1) + "\n")
    if options.check_plan:
        excesses = [route["excess"] for case in report["cases"] for route in case["routes"]]
        report["within 10 %"] = sum(excess <= 0.1 for excess in excesses) / len(excesses)
        print(f"planned route within 10 % of the fastest: {report['within 10 %']:.1%}")
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cases of the grid; no token visits more experts than there are."""
    for ffn, gate, experts, top_k, tokens in product(
        options.ffn, options.gates, options.experts, options.top_k, options.tokens
    ):
        if top_k <= experts:
            yield {
                "ffn": ffn,
                "gated": gate == "gated",
                "experts": experts,
                "top_k": top_k,
                "tokens": tokens,
            }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 and 512 tokens, a few minutes")
    parser.add_argument("--ffn", nargs="*", default=["768x3072"], help="hidden x intermediate size")
    parser.add_argument("--gates", nargs="*", default=["relu"], choices=("relu", "gated"))
    parser.add_argument("--experts", nargs="*", type=int, default=[8])
    parser.add_argument("--top-k", nargs="*", type=int, default=[1], help="experts per token")
    parser.add_argument("--tokens", nargs="*", type=int, help="default 1 to 4096")
    parser.add_argument("--modes", nargs="*", default=["infer", "train"])
    parser.add_argument("--layers", nargs="*", default=["*"], help="patterns of layer names")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--check-plan", action="store_true", help="time every route")
    parser.add_argument("--building", action="store_true", help="time the building of matrices")
    parser.add_argument("--peak", action="store_true", help="memory of a training step")
    parser.add_argument("--memory", type=float, default=18.0, help="GiB of address space (CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    options.tokens = options.tokens or ([4, 512] if options.quick else [1, 4, 16, 64, 512, 4096])
    return options


def default_output(options: argparse.Namespace) -> Path:
    """Return the result file of this machine."""
    kind = "-plan" * options.check_plan + "-building" * options.building + "-peak" * options.peak
    name = f"experts{kind}-{hardware_slug(options.device)}{'-quick' * options.quick}.json"
    return Path(__file__).parent / "results" / name


def make_call(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], mode: str) -> Callable:
    """Return the function to time: a forward pass, or a forward and a backward pass."""
    states, index, weights = inputs

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return layer(states, index, weights)

    def train() -> None:
        leaf = states.detach().requires_grad_()
        result = layer(leaf, index, weights)
        result.backward(torch.ones_like(result))
        # The gradients of all layers together do not fit into memory.
        layer.zero_grad(set_to_none=True)

    return train if mode == "train" else infer


def compare(case: dict[str, Any], library: OnTorch, options: argparse.Namespace) -> dict[str, Any]:
    """Time all layers in both modes."""
    drawn = inputs_on(options.device, case)
    chosen = makers(case, options.layers)
    rows: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for mode in options.modes:
        calls = {}
        for name, make in chosen.items():
            try:
                layer = build_on(options.device, make)
                call = make_call(layer, drawn, mode)
                expected = expected_seconds(call, library)
                rows[name] |= sizes(layer, case, drawn[1])
                if expected > HOPELESS_S:
                    rows[name][mode] = {"seconds": [expected], "median s": expected}
                else:
                    calls[name] = call, expected
            except REASONS as reason:
                rows[name][mode] = {"note": str(reason).split("\n")[0][:60]}
        seconds = take_turns(calls, library, options.repeats)
        for name, values in seconds.items():
            rows[name][mode] = {"seconds": values, "median s": median(values)}
        calls.clear()
        gc.collect()
    print(as_text(case, rows, options.modes), flush=True)
    return {"layers": rows}


def expected_seconds(call: Callable, library: OnTorch) -> float:
    """Make the first calls, and return how long one takes."""
    seconds = timed(call, library)[0]
    return seconds if seconds > LONG_S else timed(call, library)[0]


def sizes(layer: torch.nn.Module, case: dict[str, Any], index: torch.Tensor) -> dict[str, float]:
    """Count a layer's bytes, and those that it reads in a call, for each token."""
    read = read_bytes(layer, index, case["experts"])
    return {"weight bytes": weight_bytes(layer), "bytes per token": read / case["tokens"]}


def peak(case: dict[str, Any], library: OnTorch, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of a training step: weights, gradients and activations."""
    rows: dict[str, Any] = {}
    for name in makers(case, options.layers):
        # A new process, so that no layer uses memory that the allocator kept from another.
        with get_context("spawn").Pool(1) as pool:
            rows[name] = pool.apply(_peak_of, (name, case, options.device))
    table = [
        [name, *(f"{value / 2**20:.0f}" for value in row.values())] if "note" not in row
        else [name, row["note"][:24], "-"] for name, row in rows.items()
    ]  # fmt: skip
    title = ", ".join(f"{key} {value}" for key, value in case.items())
    print(f"{title}\n{format_table(['layer', 'peak MiB', 'weights MiB'], table)}\n", flush=True)
    return {"layers": rows}


def _peak_of(name: str, case: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the peak of a training step, above the memory in use before the layer was made."""
    set_threads()
    drawn = inputs_on(device, case)
    warm_up = torch.ones(512, 512, requires_grad=True, device=device)
    make = makers(case, ["*"])[name]
    # The first product loads libraries, whose memory belongs to no layer.
    warm_up.matmul(warm_up).sum().backward()
    with PeakMemory(device) as memory:
        try:
            layer = build_on(device, make)
            step = make_call(layer, drawn, "train")
            step()
            step()
        except REASONS as reason:
            return {"note": str(reason).split("\n")[0]}
    return {"peak bytes": memory.peak, "weight bytes": weight_bytes(layer)}


def as_text(case: dict[str, Any], rows: dict[str, dict[str, Any]], modes: list[str]) -> str:
    """Write the table of a case."""
    headers = ["layer", "weights MiB", "read MiB / token"]
    for mode in modes:
        headers += [f"{mode} ms", "/ best MoE", "/ dense"]
    table = []
    for name, row in rows.items():
        counts = (row.get("weight bytes"), row.get("bytes per token"))
        cells = [name, *("-" if count is None else f"{count / 2**20:.3g}" for count in counts)]
        for mode in modes:
            cells += _cells(rows, name, mode)
        table.append(cells)
    title = ", ".join(f"{key} {value}" for key, value in case.items())
    return f"{title}\n{format_table(headers, table)}\n"


def _cells(rows: dict[str, dict[str, Any]], name: str, mode: str) -> list[str]:
    """Write a layer's milliseconds, and their ratios to the best MoE and to the dense FFN."""
    if note := rows[name][mode].get("note"):
        return [note[:24], "-", "-"]
    measured = {layer: row[mode] for layer, row in rows.items() if "median s" in row[mode]}
    medians = {layer: row["median s"] for layer, row in measured.items()}
    best = min((medians[layer] for layer in BASELINES if layer in medians), default=float("inf"))
    ratios = (medians[name] / best, medians[name] / medians.get("dense FFN", float("inf")))
    return [f"{1e3 * medians[name]:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
