"""The clock, the machine's own rates, and what a reader must know about where it ran."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peers import Library

# NumPy's and torch's thread pools go on spinning for tens of milliseconds after a call. On a
# machine with few cores the next library's short calls then take whole time slices: 24 ms were
# seen for 0.14 ms. Shorter spinning of one pool only moves the penalty to the other, and a pause
# alone puts the threads to sleep. So a turn waits, runs untimed until the own pool has taken over,
# and then times several calls in a row.
SETTLE_S = 0.1
WAKE_S = 0.1
BLOCK_S = 0.1
BLOCK_CALLS = 25


def timed(call: Callable[[], Any], library: Library) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    library.synchronize()
    start = time.perf_counter()
    result = call()
    library.synchronize()
    return time.perf_counter() - start, result


def timed_turn(call: Callable[[], Any], library: Library, expected: float) -> float:
    """Median seconds of the calls in one library's turn; a long call is its only one."""
    time.sleep(SETTLE_S)
    if expected > WAKE_S:
        return timed(call, library)[0]
    _repeat(call, library, WAKE_S, limit=None)
    return median(_repeat(call, library, BLOCK_S, limit=BLOCK_CALLS))


def _repeat(
    call: Callable[[], Any], library: Library, duration: float, limit: int | None
) -> list[float]:
    """Seconds of calls in a row, for about a duration and at most ``limit`` calls."""
    seconds: list[float] = []
    while sum(seconds) < duration and (limit is None or len(seconds) < limit):
        seconds.append(timed(call, library)[0])
    return seconds


def limit_memory(gibibytes: float, device: str) -> None:
    """Let what needs more fail alone, before the machine ends the whole run."""
    if device == "cpu":
        # CUDA reserves far more addresses than it uses, so there the device itself is the limit.
        size = int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


class PeakMemory:
    """The most memory in use within a block, above what was in use before it, in bytes."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # Linux forgets the high-water mark of a process that writes 5 here.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        self.peak = now - self._before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def keep_freed_memory() -> None:
    """Let the C allocator keep what is freed, so that no call pays for new pages and the next not.

    glibc adapts by itself what it keeps, in steps that depend on everything allocated before:
    factors of 3 were seen between equal calls. Elsewhere nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # From malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3 and 32 MiB at most.
    mallopt(-1, 2**30)
    mallopt(-3, 2**25)


def set_threads() -> int:
    """Give every library the same number of threads; ``OMP_NUM_THREADS`` decides if set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("OMP_NUM_THREADS", cores or 1))
    # NumPy's BLAS does the same by itself; torch would count physical cores only.
    torch.set_num_threads(threads)
    return threads


def gemm_rate(dtype: str, device: str) -> float:
    """Operations per second of a large matrix product: the best of NumPy's and torch's."""
    size = 8192 if device == "cuda" else 2048
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    calls: list[Callable[[], Any]] = [lambda: a @ a]
    if device == "cpu":
        b = a.numpy()
        calls.append(lambda: b @ b)
    return 2 * size**3 / min(_best(call, device) for call in calls)


def copy_rate(dtype: str, device: str) -> float:
    """Bytes read and written per second by a copy of 64 MiB."""
    a = torch.ones(2**26, dtype=torch.uint8, device=device).view(getattr(torch, dtype))
    b = torch.empty_like(a)
    return 2 * 2**26 / _best(lambda: b.copy_(a), device)


def environment(packages: Iterable[str], device: str, threads: int) -> dict[str, Any]:
    """All that the JSON needs to be read on its own, versions of the packages included."""
    versions = {package: version(package) for package in packages}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--", "tnmoe")),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {**versions, "numpy": np.__version__, "torch": torch.__version__},
    }


def hardware_slug(device: str) -> str:
    """A file name for the hardware."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "" if device == "cuda" else f"-{torch.get_num_threads()}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + threads


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _best(call: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return done.stdout.strip()
