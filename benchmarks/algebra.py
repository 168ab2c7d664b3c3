"""tnmoe beside tensorly, quimb, torchTT and tntorch: times, errors, and missing operations.

    python benchmarks/algebra.py --quick
    python benchmarks/algebra.py --cases 'decompose*' --repeats 9
    python benchmarks/algebra.py --large --cases 'decompose 14336*' --limit 300

All libraries take turns within one run; machine.py describes a turn. The script reports medians
beside the error against the dense answer in double precision. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cases import Case, all_cases, assess, taking_part
from isolated import run_isolated
from library import Library, Unsupported
from machine import (
    copy_rate,
    environment,
    gemm_rate,
    hardware_slug,
    keep_freed_memory,
    limit_memory,
    set_threads,
    timed,
    timed_turn,
)

from tnmoe.system.tables import format_table

# Turns of a case by default, and in quick runs.
REPEATS, QUICK_REPEATS = 7, 3
HEADERS = ("library", "median ms", "rel. error", "parameters", "/ tnmoe", "/ floor", "")


def main() -> None:
    """Run the selected cases, and write and print their results."""
    # Only here: gpu_algebra.py measures cases where the peers are not installed.
    from peers import libraries

    options = parse_arguments()
    limit_memory(options.memory, options.device)
    keep_freed_memory()
    threads = set_threads()
    libs = libraries(options.device)
    rates = {
        "gemm flops/s": gemm_rate(options.dtype, options.device),
        "copy bytes/s": copy_rate(options.dtype, options.device),
    }
    report: dict[str, Any] = {
        "environment": environment([lib.package for lib in libs], options.device, threads),
        "options": {name: str(value) for name, value in vars(options).items()},
        "rates": rates,
        "cases": [],
    }
    print(json.dumps(report["environment"], indent=1))
    print(
        f"matrix products at {rates['gemm flops/s'] / 1e9:.0f} GFLOP/s, "
        f"copies at {rates['copy bytes/s'] / 1e9:.1f} GB/s ({options.dtype}, {options.device})\n"
    )
    output = options.output or default_output(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in selected(options):
        rows = run_isolated(case, libs, options) if case.large else run_case(case, libs, options)
        report["cases"].append(finish(case, rows, rates, options))
        print(as_text(report["cases"][-1]), flush=True)
        # After every case, so that an interrupted run keeps its results.
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few minutes")
    parser.add_argument("--large", action="store_true", help="also 14336x4096: minutes per peer")
    parser.add_argument("--cases", nargs="*", default=["*"], help="patterns of case names")
    parser.add_argument("--libraries", nargs="*", default=["*"], help="patterns of library names")
    parser.add_argument("--repeats", type=int, help="timed calls (default 7; 3 if quick or large)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds one call may take")
    parser.add_argument(
        "--memory", type=float, default=16.0, help="GiB of address space, on the CPU"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--matrix", choices=("structured", "gaussian"), default="structured")
    parser.add_argument("--list", action="store_true", help="print the case names and stop")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.list:
        parser.exit(message="".join(f"{case.name}\n" for case in selected(options)))
    return options


def selected(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options name."""
    cases = all_cases(options.quick, options.dtype, options.matrix)
    return [
        case
        for case in cases
        if any(fnmatch(case.name, pattern) for pattern in options.cases)
        and (options.large or not case.large)
    ]


def default_output(options: argparse.Namespace) -> Path:
    """Return the result file of this machine."""
    name = f"algebra-{hardware_slug(options.device)}{'-quick' * options.quick}.json"
    return Path(__file__).parent / "results" / name


def run_case(case: Case, libs: list[Library], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per library: a first call shows its error, then the fast ones take turns."""
    inputs = case.make()
    calls, rows = {}, []
    for library in taking_part(case, libs, options.libraries):
        row, call = first_call(case, library, inputs, options.limit)
        rows.append(row)
        if call is not None:
            calls[library] = (row, call)
    for _ in range(options.repeats or (QUICK_REPEATS if options.quick else REPEATS)):
        for library, (row, call) in calls.items():
            row["seconds"].append(timed_turn(call, library, row["first call s"]))
    return rows


def first_call(
    case: Case, library: Library, inputs: list[Any], limit: float
) -> tuple[dict[str, Any], Any]:
    """Call a library once; return a row with its error or failure, and the call to repeat."""
    row: dict[str, Any] = {"library": library.name, "seconds": []}
    try:
        arguments = case.arguments(library, inputs)
        call = partial(getattr(library, case.operation), *arguments, **case.options)
        seconds, result = timed(call, library)
        outcome = assess(case, library, inputs, result)
    except Unsupported as reason:
        return {**row, "note": str(reason)}, None
    except Exception as error:
        # A peer's failure is a result, and must not end the run.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return {**row, "note": "out of memory"}, None
        lines = str(error).splitlines() or [""]
        return {**row, "note": f"fails: {type(error).__name__}: {lines[0][:80]}"}, None
    row |= {"first call s": seconds, **vars(outcome)}
    if seconds > limit:
        row |= {"seconds": [seconds], "note": "one call, no warm-up"}
        return row, None
    return row, call


def finish(
    case: Case, rows: list[dict[str, Any]], rates: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Add medians, verdicts on accuracy, the floor, and the ratio of the best peer to tnmoe."""
    done = [row for row in rows if row["seconds"]]
    for row in done:
        row["median s"] = median(row["seconds"])
    bar = acceptable_error(case, done, options.dtype)
    for row in done:
        # Written so that NaN does not pass.
        row["good"] = row["error"] <= bar
        if not row["good"]:
            row["note"] = "too inaccurate to compare"
    good = [row for row in done if row["good"]]
    ours = [row for row in good if row["library"].startswith("tnmoe")]
    peers = [row for row in good if row not in ours]
    best = min(ours, key=lambda row: row["median s"], default=None)
    peer = min(peers, key=lambda row: row["median s"], default=None)
    floor = floor_seconds(case, best, rates, 4 if options.dtype == "float32" else 8)
    for row in done:
        row["/ tnmoe"] = row["median s"] / best["median s"] if best else None
        row["/ floor"] = row["median s"] / floor if floor else None
    speedups = {row["library"]: peer["median s"] / row["median s"] for row in ours if peer}
    return {
        "case": case.name,
        "acceptable error": bar,
        "floor s": floor,
        "fastest peer": peer["library"] if peer else None,
        "fastest peer / tnmoe": speedups,
        "rows": rows,
    }


def acceptable_error(case: Case, rows: list[dict[str, Any]], dtype: str) -> float:
    """Return the largest error that counts: the case's tolerance, rounding, or near the best."""
    rounding = 1e-5 if dtype == "float32" else 1e-13
    if "rtol" in case.options:
        return case.options["rtol"] * 1.001 + rounding
    if "max_bond" in case.options:
        return 1.01 * min((row["error"] for row in rows), default=0.0) + rounding
    return rounding


def floor_seconds(
    case: Case, best: dict[str, Any] | None, rates: dict[str, float], itemsize: int
) -> float | None:
    """Return the seconds of the unavoidable products, or of reading and writing; see cases.py."""
    if best is None:
        return None
    products = case.flops(best["bonds"]) / rates["gemm flops/s"]
    moved = sum(map(_numbers, case.make())) + (best["params"] or 0)
    return max(products, moved * itemsize / rates["copy bytes/s"])


def as_text(result: dict[str, Any]) -> str:
    """Write the table of one case with its verdict."""
    table = []
    for row in result["rows"]:
        if not row["seconds"]:
            table.append([row["library"], "-", "-", "-", "-", "-", row.get("note", "")])
            continue
        table.append(
            [
                row["library"],
                f"{row['median s'] * 1e3:.3f}",
                f"{row['error']:.2e}",
                "" if row["params"] is None else row["params"],
                _ratio(row["/ tnmoe"]),
                _ratio(row["/ floor"]),
                row.get("note", ""),
            ]
        )
    lines = [result["case"], format_table(HEADERS, table)]
    if result["fastest peer / tnmoe"]:
        speedups = ", ".join(
            f"{name} {ratio:.2f}x" for name, ratio in result["fastest peer / tnmoe"].items()
        )
        lines.append(f"against the fastest accurate peer, {result['fastest peer']}: {speedups}")
    return "\n".join(lines) + "\n"


def _ratio(value: float | None) -> str:
    """Write a ratio with two decimals."""
    return "-" if value is None else f"{value:.2f}"


def _numbers(value: Any) -> int:
    """Count the numbers in an input, at any depth."""
    if hasattr(value, "nbytes"):
        return value.size
    return sum(map(_numbers, value)) if isinstance(value, (list, tuple)) else 0


if __name__ == "__main__":
    main()
