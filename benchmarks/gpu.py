"""Everything that needs a GPU, in under eight minutes: checks, experts, algebra, training, CuPy.

    python benchmarks/gpu.py                        # make gpu does the same
    python benchmarks/gpu.py --parts checks experts
    python benchmarks/gpu.py --tiny                 # small, in under two minutes, on a CPU as well

A checkout is enough: the script needs torch, NumPy, SciPy, opt_einsum and safetensors, and skips
parts that need more. Where CuPy is installed, its tests take up to three more minutes. Every part
runs in its own process, with a limit on its time, and writes its results after every row. So they
stay, whatever happens to the part or to later ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
# tnmoe of this checkout, which need not be installed.
sys.path.insert(0, str(HERE.parent))

PACKAGES = ("transformers", "triton", "scipy", "opt_einsum", "safetensors")


class Limits(NamedTuple):
    """Seconds after which a part starts no further row, and after which it is killed."""

    budget: float
    kill: float


# The part ``name`` is the module gpu_name.py with two functions: ``rows(device, tiny)`` yields
# dictionaries, and ``summary(rows)`` makes a text of them.
PARTS = {
    "checks": Limits(100, 140),
    "experts": Limits(110, 140),
    "algebra": Limits(40, 60),
    "training": Limits(70, 100),
    "cupy": Limits(140, 180),
}


def main() -> None:
    """Run the parts, or a single one in this process, and print what they found."""
    options = parse_arguments()
    if options.run:
        run_here(options.run, options.output, options.device, options.tiny, options.budget)
        return
    found = describe(options.device)
    folder = options.output or HERE / "results" / f"gpu-{found['slug']}{'-tiny' * options.tiny}"
    records = []
    for name in options.parts:
        limits = Limits(*(options.patience * seconds for seconds in PARTS[name]))
        print(f"\n{name}: at most {limits.kill:.0f} s", flush=True)
        records.append(run_apart(name, limits, folder, found, options))
        print(records[-1]["summary"], flush=True)
    print(f"\n{overview(records)}\nwritten to {folder}")
    sys.exit(not all(map(is_good, records)))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--output", type=Path, help="folder (default: one in benchmarks/results)")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits on time")
    # For the process of a part.
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or best_device()
    if options.device == "cpu" and not options.tiny:
        parser.error("torch sees no GPU here: use --tiny to try the script on the CPU")
    return options


def best_device() -> str:
    """Return ``cuda`` where torch can use a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str) -> dict[str, Any]:
    """Describe the machine: its ``slug`` names the folder of the results."""
    import torch
    from machine import copy_rate, environment, gemm_rate, hardware_slug

    found = environment(PACKAGES, device, torch.get_num_threads())
    found["slug"] = hardware_slug(device)
    if device == "cuda":
        found["CUDA"], found["capability"] = torch.version.cuda, torch.cuda.get_device_capability()
        found["bfloat16 flops/s"] = gemm_rate("bfloat16", device)
        found["copy bytes/s"] = copy_rate("bfloat16", device)
        # The parts need the memory.
        torch.cuda.empty_cache()
    return found


def run_apart(
    name: str, limits: Limits, folder: Path, found: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Run a part in a process of its own, and return what it left."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write(path, {"part": name, "status": "running", "environment": found, "tiny": options.tiny,
                 "seconds": 0.0, "summary": "", "rows": []})  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(HERE / "gpu.py"), "--run", name,
               "--device", options.device, "--output", str(path), "--budget", str(limits.budget),
               *["--tiny"] * options.tiny]  # fmt: skip
    start = time.monotonic()
    # On a busy CPU, threads that wait for each other would use up the time of the part.
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    # With a session of its own, so that processes which the part has started end with it.
    process = subprocess.Popen(command, start_new_session=True, env={**threads, **os.environ})
    try:
        status = f"ended with exit status {process.wait(limits.kill)}"
    except subprocess.TimeoutExpired:
        status = f"killed after {limits.kill:.0f} s"
    finally:
        end_session(process)
    record = json.loads(path.read_text())
    if record["status"] == "running":
        record["status"] = status
    record["seconds"] = time.monotonic() - start
    write(path, record)
    return record


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that are left of the session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(name: str, path: Path, device: str, tiny: bool, budget: float) -> None:
    """Run a part in this process; the record says how it ended."""
    record = json.loads(path.read_text())
    try:
        part = importlib.import_module(f"gpu_{name}")
        status = collect(part, record, path, (device, tiny), time.monotonic() + budget)
    except ModuleNotFoundError as error:
        status = f"skipped: needs the package {error.name}"
    except Exception as error:
        traceback.print_exc()
        status = f"failed: {first_line(error)}"
    write(path, {**record, "status": status})


def collect(
    part: ModuleType, record: dict[str, Any], path: Path, settings: tuple, deadline: float
) -> str:
    """Add the rows of a part to its record, write it after every row, and return how it ended."""
    for row in part.rows(*settings):
        record["rows"].append(row)
        record["summary"] = part.summary(record["rows"])
        write(path, record)
        if time.monotonic() > deadline:
            return "stopped when its time was up"
    return "complete"


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the beginning of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record such that a kill leaves the old file or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


def is_good(record: dict[str, Any]) -> bool:
    """Return whether a part did what it could, and no row of it says that something failed."""
    ended_well = record["status"].startswith(("complete", "stopped", "skipped"))
    return ended_well and not failures(record)


def failures(record: dict[str, Any]) -> int:
    """Count the rows of a part that say that something failed."""
    return sum(row.get("status") == "failed" for row in record["rows"])


def overview(records: list[dict[str, Any]]) -> str:
    """Write how every part ended."""
    from tnmoe.system.tables import format_table

    table = [
        [each["part"], f"{each['seconds']:.0f}", len(each["rows"]), failures(each), each["status"]]
        for each in records
    ]
    return format_table(["part", "seconds", "rows", "failed", "status"], table)


if __name__ == "__main__":
    main()
