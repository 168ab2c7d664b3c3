"""Large matrices and many matrices: memory, streaming from a file, batches beside a loop.

    python benchmarks/large.py
    python benchmarks/large.py --parts streamed --streamed-size 44800 --folder /scratch

Every measurement of memory runs in a process of its own. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import PeakMemory, environment, hardware_slug, set_threads

import tnmoe as tn
from tnmoe.system.tables import format_table

PARTS = ("memory", "streamed", "batch")
LIMITS: dict[str, dict[str, Any]] = {
    "exact": {},
    "bond 64": {"max_bond": 64},
    "bond 16": {"max_bond": 16},
    "rtol 1e-2": {"rtol": 1e-2},
}
# Bond of the operator that all matrices are made of, and the noise that is added to its entries.
BOND, NOISE = 16, 0.003
TURNS = 3


def main() -> None:
    """Measure the selected parts, and write and print their results."""
    options = parse_arguments()
    if options.worker:
        print(json.dumps(WORKERS[options.worker["part"]](**options.worker)))
        return
    threads = set_threads()
    report: dict[str, Any] = {"environment": environment(["tnmoe"], "cpu", threads)}
    for part in options.parts:
        rows = [_run(job) for job in _jobs(part, options)]
        report[part] = rows
        print(part, format_table(list(rows[0]), [list(row.values()) for row in rows]), sep="\n")
    name = f"large-{hardware_slug('cpu')}.json"
    output = options.output or Path(__file__).parent / "results" / name
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--size", type=int, default=20000, help="rows of the matrix in memory")
    parser.add_argument("--streamed-size", type=int, default=44800, help="rows of that in a file")
    parser.add_argument("--memory", type=int, default=2**30, help="bytes for streaming")
    parser.add_argument("--batch", type=int, default=1000, help="matrices of 256x256")
    parser.add_argument("--folder", type=Path, help="for the file, which takes 4 bytes per entry")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def _jobs(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the measurements of a part."""
    if part == "memory":
        return [
            {"part": part, "library": library, "limit": limit, "size": options.size}
            for library in ("numpy", "torch")
            for limit in ("bond 64", "rtol 1e-2")
        ]
    if part == "streamed":
        folder = str(options.folder) if options.folder else None
        fixed = {"size": options.streamed_size, "memory": options.memory, "folder": folder}
        return [{"part": part, "limit": limit, **fixed} for limit in ("bond 64", "rtol 1e-2")]
    return [
        {"part": part, "library": library, "sites": sites, "limit": limit, "count": options.batch}
        for library in ("numpy", "torch")
        for sites in (3, 5)
        for limit in ("exact", "bond 16", "rtol 1e-2")
    ]


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(part: str, library: str, limit: str, size: int) -> dict[str, Any]:
    """Decompose a matrix in memory."""
    set_threads()
    shape = tn.MPOShape.for_matrix(size, size)
    matrix = np.empty((size, size), np.float32)
    for start, block in blocks(shape):
        matrix[start : start + len(block)] = block
    array = matrix if library == "numpy" else torch.from_numpy(matrix)
    with PeakMemory("cpu") as memory:
        start = time.perf_counter()
        mpo = tn.decompose(array, shape, **LIMITS[limit])
        seconds = time.perf_counter() - start
    return {
        "matrix": f"{size}x{size}",
        "library": library,
        "limit": limit,
        "bonds": str(mpo.bond_dims),
        "seconds": round(seconds, 1),
        "peak / matrix": round(1 + memory.peak / matrix.nbytes, 2),
    }


def measure_streamed(
    part: str, limit: str, size: int, memory: int, folder: str | None
) -> dict[str, Any]:
    """Decompose a matrix in a file, which is written first."""
    set_threads()
    shape = tn.MPOShape.for_matrix(size, size)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "matrix"
        with path.open("wb") as file:
            for _, block in blocks(shape):
                block.tofile(file)
        source = np.memmap(path, np.float32, "r", shape=(size, size))
        rows_read = []
        with PeakAnonymous() as peak:
            start = time.perf_counter()
            mpo, info = tn.decompose_streamed(
                source,
                shape,
                memory=memory,
                return_info=True,
                on_progress=lambda done, _: rows_read.append(done),
                **LIMITS[limit],
            )
            seconds = time.perf_counter() - start
    return {
        "matrix": f"{size}x{size}",
        "GB": round(4 * size**2 / 1e9, 2),
        "limit": limit,
        "bonds": str(mpo.bond_dims),
        "passes": rows_read[-1] // size,
        "seconds": round(seconds, 1),
        "GB of memory": round(peak.peak / 1e9, 2),
        "error bound": float(f"{info.error_bound / float(mpo.norm()):.2e}"),
    }


def measure_batch(part: str, library: str, sites: int, limit: str, count: int) -> dict[str, Any]:
    """Decompose many matrices in one call and one by one, in turns."""
    set_threads()
    shape = tn.MPOShape.for_matrix(256, 256, sites)
    matrices = np.stack([whole(shape, seed) for seed in range(count)])
    array = matrices if library == "numpy" else torch.from_numpy(matrices)
    calls = {
        "batch": lambda: tn.decompose_batch(array, shape, **LIMITS[limit]),
        "loop": lambda: [tn.decompose(matrix, shape, **LIMITS[limit]) for matrix in array],
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.process_time()  # of this process alone: others may share the machine
            call()
            seconds[name].append(time.process_time() - start)
    batch, loop = median(seconds["batch"]), median(seconds["loop"])
    return {
        "matrices": count,
        "library": library,
        "legs": str(shape.legs),
        "limit": limit,
        "batch ms": round(1e3 * batch / count, 3),
        "loop ms": round(1e3 * loop / count, 3),
        "loop / batch": round(loop / batch, 2),
    }


def blocks(shape: tn.MPOShape, seed: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the rows of each block of a matrix of low bond with noise."""
    rng = np.random.default_rng(seed)
    sizes = shape.core_shapes(shape.bond_dims(BOND))
    cores = [(rng.standard_normal(size) / size[0] ** 0.5).astype(np.float32) for size in sizes]
    rows = shape.out_features // shape.out_dims[0]
    part = tn.MPOShape((1, *shape.out_dims[1:]), shape.in_dims)
    for index in range(shape.out_dims[0]):
        block = tn.MPO([cores[0][:, index : index + 1], *cores[1:]], part).to_matrix()
        # In place and in float32, so that a block takes no more memory than it must.
        noise = rng.standard_normal(block.shape, dtype=np.float32)
        noise *= NOISE * block.std()
        block += noise
        yield index * rows, block


def whole(shape: tn.MPOShape, seed: int) -> np.ndarray:
    """Return one matrix of low bond with noise."""
    return np.concatenate([block for _, block in blocks(shape, seed)])


class PeakAnonymous:
    """The peak of the memory that a block takes, without pages of files, in bytes.

    A memory map counts as memory of the process while the system keeps its pages, which it drops
    when anything else needs them.
    """

    def __enter__(self) -> PeakAnonymous:
        self._before = self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak -= self._before

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    """Read the memory of this process that belongs to no file, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


WORKERS = {"memory": measure_memory, "streamed": measure_streamed, "batch": measure_batch}

if __name__ == "__main__":
    main()
