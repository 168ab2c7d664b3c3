"""The clock, the machine's own rates, and a description of the machine."""

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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from library import Library

# NumPy's and torch's thread pools spin for tens of milliseconds after a call. On a machine with few
# cores, the next library's short calls then take whole time slices: a call of 0.14 ms took 24 ms.
# If one pool spins for a shorter time, the other pays instead; after a pause alone, the threads are
# asleep. A turn therefore waits, makes untimed calls until its own threads are awake, and then
# times several calls in a row.
SETTLE_S = 0.1
WAKE_S = 0.1
BLOCK_S = 0.1
BLOCK_CALLS = 25


def timed(call: Callable[[], Any], library: Library) -> tuple[float, Any]:
    """Time one call, and return the seconds and its result."""
    library.synchronize()
    start = time.perf_counter()
    result = call()
    library.synchronize()
    return time.perf_counter() - start, result


def timed_turn(call: Callable[[], Any], library: Library, expected: float) -> float:
    """Return the median seconds of the calls in one library's turn; a long call is made once."""
    time.sleep(SETTLE_S)
    if expected > WAKE_S:
        return timed(call, library)[0]
    _repeat(call, library, WAKE_S, limit=None)
    return median(_repeat(call, library, BLOCK_S, limit=BLOCK_CALLS))


def take_turns(
    calls: dict[str, tuple[Callable[[], Any], float]], library: Library, turns: int
) -> dict[str, list[float]]:
    """Time calls, each given with its expected seconds, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, (call, expected) in calls.items():
            seconds[name].append(timed_turn(call, library, expected))
    return seconds


def _repeat(
    call: Callable[[], Any], library: Library, duration: float, limit: int | None
) -> list[float]:
    """Time calls in a row, for about a duration and at most ``limit`` calls."""
    seconds: list[float] = []
    while sum(seconds) < duration and (limit is None or len(seconds) < limit):
        seconds.append(timed(call, library)[0])
    return seconds


def limit_memory(gibibytes: float, device: str) -> None:
    """Limit the memory of the process, so that one call fails and not the whole run."""
    if device == "cpu":
        # CUDA reserves far more addresses than it uses; there the device itself is the limit.
        size = int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


class PeakMemory:
    """The peak of the memory in use in a block, in bytes above the memory in use before it."""

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
    """Read a size of this process from Linux, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def keep_freed_memory() -> None:
    """Let the C allocator keep freed memory, so that no call has to pay for new pages.

    By itself, glibc adapts the amount that it keeps to all earlier allocations, and equal calls
    differed by factors of 3. Without glibc the function does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # From malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3 and 32 MiB at most.
    mallopt(-1, 2**30)
    mallopt(-3, 2**25)


def set_threads() -> int:
    """Give every library the same number of threads: ``OMP_NUM_THREADS``, or all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("OMP_NUM_THREADS", cores or 1))
    # NumPy's BLAS does so by itself; torch counts physical cores only.
    torch.set_num_threads(threads)
    return threads


def gemm_rate(dtype: str, device: str) -> float:
    """Measure the operations per second of a large product, the best of NumPy's and torch's."""
    size = 8192 if device == "cuda" else 2048
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    calls: list[Callable[[], Any]] = [lambda: a @ a]
    if device == "cpu":
        b = a.numpy()
        calls.append(lambda: b @ b)
    return 2 * size**3 / min(_best(call, device) for call in calls)


def copy_rate(dtype: str, device: str) -> float:
    """Measure the bytes read and written per second by a copy of 64 MiB."""
    a = torch.ones(2**26, dtype=torch.uint8, device=device).view(getattr(torch, dtype))
    b = torch.empty_like(a)
    return 2 * 2**26 / _best(lambda: b.copy_(a), device)


def environment(packages: Iterable[str], device: str, threads: int) -> dict[str, Any]:
    """Describe the machine, the commit and the versions of packages for the JSON."""
    versions = {package: found for package in packages if (found := _installed(package))}
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


def _installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware_slug(device: str) -> str:
    """Name the hardware in a way that fits into a file name."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "" if device == "cuda" else f"-{torch.get_num_threads()}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + threads


def cpu_name() -> str:
    """Return the model name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _best(call: Callable[[], Any], device: str) -> float:
    """Return the shortest of six timings."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _git(*arguments: str) -> str:
    """Ask git about this repository; return an empty string without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return done.stdout.strip()
