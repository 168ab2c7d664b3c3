"""Layers of experts side by side: forward, and forward with backward, of the same tokens.

    python benchmarks/experts.py --quick
    python benchmarks/experts.py --experts 8 --tokens 512 4096
    python benchmarks/experts.py --layers 'tnmoe*' grouped_mm --modes train
    python benchmarks/experts.py --check-plan      # every route beside the planned one
    python benchmarks/experts.py --building        # building matrices beside the machine's rate
    python benchmarks/experts.py --peak --tokens 512   # memory of a training step

Layers take turns within a run; machine.py describes a turn. Medians are taken over turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import expert_layers
import torch
from machine import (
    PeakMemory,
    environment,
    gemm_rate,
    hardware_slug,
    keep_freed_memory,
    limit_memory,
    set_threads,
    timed,
    timed_turn,
)
from peers import OnTorch, Unsupported

import tnmoe as tn
from tnmoe.nn import MPOProjection, weight_cache
from tnmoe.nn.compute.calibrate import calibrate
from tnmoe.nn.compute.matrices import MatrixBuilder, environments
from tnmoe.nn.compute.slots import Groups
from tnmoe.system.tables import format_table

FFNS = {"768x3072": (768, 3072), "1024x4096": (1024, 4096)}
PACKAGES = ("tnmoe", "transformers", "torchTT", "tensorly-torch")
BASELINES = ("Switch loop", "grouped_mm")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
ROUTES = ("joint", "per_expert", "rebuilt", "cached")
# A route that is predicted to take longer than this multiple of the fastest is not measured.
HOPELESS = 6


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
        for ffn, gate, experts, tokens in product(
            options.ffn, options.gates, options.experts, options.tokens
        ):
            case = {"ffn": ffn, "gated": gate == "gated", "experts": experts, "tokens": tokens}
            report["cases"].append(case | measure(case, library, options))
            output.write_text(json.dumps(report, indent=1) + "\n")
    if options.check_plan:
        excesses = [route["excess"] for case in report["cases"] for route in case["routes"]]
        report["within 10 %"] = sum(excess <= 0.1 for excess in excesses) / len(excesses)
        print(f"planned route within 10 % of the fastest: {report['within 10 %']:.1%}")
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 and 512 tokens, a few minutes")
    parser.add_argument("--ffn", nargs="*", default=["768x3072"], choices=FFNS)
    parser.add_argument("--gates", nargs="*", default=["relu"], choices=("relu", "gated"))
    parser.add_argument("--experts", nargs="*", type=int, default=[8])
    parser.add_argument("--tokens", nargs="*", type=int, help="default 1, 8, 64, 512 and 4096")
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
    options.tokens = options.tokens or ([8, 512] if options.quick else [1, 8, 64, 512, 4096])
    return options


def default_output(options: argparse.Namespace) -> Path:
    """Return the result file of this machine."""
    kind = "-plan" * options.check_plan + "-building" * options.building + "-peak" * options.peak
    name = f"experts{kind}-{hardware_slug(options.device)}{'-quick' * options.quick}.json"
    return Path(__file__).parent / "results" / name


def inputs_on(device: str, case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Draw states, their experts and weights on a device."""
    with torch.device(device):
        states, index, weights = expert_layers.inputs(
            case["tokens"], case["experts"], FFNS[case["ffn"]][0]
        )
    dtype = getattr(torch, DTYPES[device])
    return states.to(dtype), index, weights.to(dtype)


def build_on(device: str, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a layer on a device, in the dtype that the benchmark measures there."""
    # Only for this block: with a default device, torch spends microseconds on every call.
    with torch.device(device):
        return make().to(getattr(torch, DTYPES[device]))


def make_call(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], mode: str) -> Callable:
    """Return the function to time: a forward pass, or a forward and a backward pass."""
    states, index, weights = inputs

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return layer(states, index, weights)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = states.detach().requires_grad_()
        result = layer(leaf, index, weights)
        result.backward(torch.ones_like(result))

    return train if mode == "train" else infer


def compare(case: dict[str, Any], library: OnTorch, options: argparse.Namespace) -> dict[str, Any]:
    """Time all layers in both modes."""
    hidden, inner = FFNS[case["ffn"]]
    inputs = inputs_on(options.device, case)
    makers = [
        (name, make)
        for name, make in expert_layers.layers(case["experts"], hidden, inner, case["gated"])
        if any(fnmatch(name, pattern) for pattern in options.layers)
    ]
    rows: dict[str, dict[str, Any]] = {name: {} for name, _ in makers}
    for mode in options.modes:
        calls = {}
        for name, make in makers:
            try:
                layer = build_on(options.device, make)
                call = make_call(layer, inputs, mode)
                call()
                calls[name] = call, timed(call, library)[0]
                rows[name]["weight bytes"] = weight_bytes(layer)
            except (Unsupported, RuntimeError, MemoryError) as reason:
                rows[name][mode] = {"note": str(reason).split("\n")[0][:60]}
        seconds = take_turns(calls, library, options.repeats)
        for name, values in seconds.items():
            rows[name][mode] = {"seconds": values, "median s": median(values)}
        calls.clear()
        gc.collect()
    print(as_text(case, rows, options.modes), flush=True)
    return {"layers": rows}


def peak(case: dict[str, Any], library: OnTorch, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of a training step: weights, gradients and activations."""
    rows: dict[str, Any] = {}
    hidden, inner = FFNS[case["ffn"]]
    for name, _ in expert_layers.layers(case["experts"], hidden, inner, case["gated"]):
        if any(fnmatch(name, pattern) for pattern in options.layers):
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
    hidden, inner = FFNS[case["ffn"]]
    inputs = inputs_on(device, case)
    warm_up = torch.ones(512, 512, requires_grad=True, device=device)
    makers = dict(expert_layers.layers(case["experts"], hidden, inner, case["gated"]))
    # The first product loads libraries, whose memory belongs to no layer.
    warm_up.matmul(warm_up).sum().backward()
    with PeakMemory(device) as memory:
        try:
            layer = build_on(device, makers[name])
            step = make_call(layer, inputs, "train")
            step()
            step()
        except (Unsupported, RuntimeError, MemoryError) as reason:
            return {"note": str(reason).split("\n")[0]}
    return {"peak bytes": memory.peak, "weight bytes": weight_bytes(layer)}


def weight_bytes(layer: torch.nn.Module) -> int:
    """Count the bytes of a layer's parameters."""
    return sum(weight.numel() * weight.element_size() for weight in layer.parameters())


def take_turns(
    calls: dict[str, tuple[Callable, float]], library: OnTorch, repeats: int
) -> dict[str, list[float]]:
    """Time calls in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (call, expected) in calls.items():
            seconds[name].append(timed_turn(call, library, expected))
    return seconds


def as_text(case: dict[str, Any], rows: dict[str, dict[str, Any]], modes: list[str]) -> str:
    """Write the table of a case."""
    headers, table = ["layer"], []
    for mode in modes:
        headers += [f"{mode} ms", "/ best MoE"]
    best = {
        mode: min(
            (rows[name][mode].get("median s", float("inf")) for name in BASELINES if name in rows),
            default=float("inf"),
        )
        for mode in modes
    }
    for name, row in rows.items():
        cells = [name]
        for mode in modes:
            value = row[mode].get("median s")
            if value is None:
                cells += [row[mode]["note"][:24], "-"]
            else:
                cells += [f"{1e3 * value:.2f}", f"{value / best[mode]:.2f}"]
        table.append(cells)
    title = ", ".join(f"{key} {value}" for key, value in case.items())
    return f"{title}\n{format_table(headers, table)}\n"


def check_plan(
    case: dict[str, Any], library: OnTorch, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one projection by every route, and compare the planned route with the fastest."""
    hidden, inner = FFNS[case["ffn"]]
    states, index, _ = inputs_on(options.device, case)
    groups = Groups.of(index.reshape(-1), case["experts"])
    states = states[groups.order]
    shapes: list[tuple[str, tn.MPOShape, int | None]] = [
        (f"bond {bond or 'exact'}", tn.MPOShape.for_matrix(inner, hidden, 5), bond)
        for bond in expert_layers.BONDS
    ] + [
        (f"split {group}", tn.MPOShape.split(inner, hidden, group, group), None)
        for group in expert_layers.GROUPS
    ]
    found, table = [], []
    for (name, shape, bond), mode in product(shapes, options.modes):
        make = partial(MPOProjection, case["experts"], shape, max_bond=bond)
        projection = build_on(options.device, make)
        planned = projection.plan(case["tokens"], mode == "train")
        limit = HOPELESS * min(planned.seconds.values())
        calls = {
            route: partial(_one_route, projection, route, states, groups, mode == "train")
            for route in ROUTES
            if planned.seconds.get(route, float("inf")) <= limit
        }
        medians = _medians_when_cold(calls, library, options.repeats)
        fastest = min(medians, key=lambda route: medians[route])
        excess = medians[planned.route] / medians[fastest] - 1
        found.append({"shape": name, "mode": mode, "planned": planned.route, "excess": excess,
                      "seconds": medians, "predicted": planned.seconds})  # fmt: skip
        table.append([name, mode, planned.route, fastest, f"{excess:.0%}",
                      *(f"{1e3 * medians[r]:.2f}" if r in medians else "-" for r in ROUTES),
                      *(f"{1e3 * planned.seconds[r]:.2f}" if r in planned.seconds else "-"
                        for r in ROUTES)])  # fmt: skip
    headers = ["shape", "mode", "planned", "fastest", "excess", *ROUTES, *(f"~{r}" for r in ROUTES)]
    print(f"{case}\n{format_table(headers, table)}\n", flush=True)
    return {"routes": found}


def _medians_when_cold(
    calls: dict[str, Callable], library: OnTorch, repeats: int
) -> dict[str, float]:
    """Time calls in turns with cold caches, and return the medians.

    A model has many layers, so the arrays of a layer are in no cache when its turn comes.
    """
    other = torch.ones(2**25, device=library.device)
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds, start = 0, time.perf_counter()
    while rounds < 5 * repeats and (rounds < 3 or time.perf_counter() - start < repeats):
        for name, call in calls.items():
            other.add_(1)
            seconds[name].append(timed(call, library)[0])
        rounds += 1
    return {name: median(values) for name, values in seconds.items()}


def _one_route(
    projection: MPOProjection, route: str, states: torch.Tensor, groups: Any, training: bool
) -> None:
    projection.route = route
    if not training:
        with torch.no_grad():
            projection(states, groups)
        return
    projection.zero_grad(set_to_none=True)
    result = projection(states.detach().requires_grad_(), groups)
    result.backward(torch.ones_like(result))


@torch.no_grad()
def building(library: OnTorch, rate: float) -> list[dict[str, Any]]:
    """Time the building of 8 experts' matrices, and compare its rate with the machine's."""
    found, table = [], []
    for bond in expert_layers.BONDS:
        shape = tn.MPOShape.for_matrix(3072, 768, 5)
        projection = build_on(library.device, partial(MPOProjection, 8, shape, max_bond=bond))
        cores = projection.cores
        left, right = environments(cores)
        call = partial(_build_in_turn, MatrixBuilder(cores.center, cores.legs), left, right)
        call()
        seconds = median(take_turns({"": (call, timed(call, library)[0])}, library, 7)[""])
        columns = projection.center[0].numel()
        factor_rows = left.shape[1] * columns // right.shape[1]
        operations = left[0].numel() * columns + factor_rows * right[0].numel()
        share = 8 * 2 * operations / seconds / rate
        found.append({"bond": bond, "seconds": seconds, "share": share})
        table.append([bond or "exact", f"{1e3 * seconds:.1f}", f"{share:.0%}"])
    print(format_table(["bond", "ms", "of the rate"], table))
    return found


def _build_in_turn(builder: MatrixBuilder, left: torch.Tensor, right: torch.Tensor) -> None:
    turns = [(left, right)] if left.is_cuda else zip(left.split(1), right.split(1), strict=True)
    for lefts, rights in turns:
        products = builder.left_products(lefts)
        for part, _ in builder.row_blocks():
            builder.matrix_rows(builder.left_factor(products[:, part]), rights)


if __name__ == "__main__":
    main()
