"""The property tests of the algebra over CuPy, part of gpu.py; without a GPU, over a stand-in.

A row is a file of tests. The part needs CuPy, pytest and hypothesis.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - the tests need it: gpu.py names the package if it is missing
import pytest  # noqa: F401

from tests.backends import CUPY_TESTS, PROPERTY_TESTS
from tnmoe.system.tables import format_table

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"TNMOE_TEST_BACKEND": "tests.backends.cupy_or_stand_in", "HYPOTHESIS_PROFILE": "quick"}


def rows(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield how the tests of every file ended."""
    library = name_of_cupy() if device == "cuda" else "stand-in for CuPy"
    files = CUPY_TESTS if tiny else (*CUPY_TESTS, *PROPERTY_TESTS)
    # Tests leave a GPU idle most of the time, so several processes share it.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, found in zip(files, pool.map(outcome, files), strict=True):
            yield {"file": file, "library": library, **found}


def name_of_cupy() -> str:
    """Name CuPy's version and the GPU that it finds; raise an error if there is none."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"CuPy {cupy.__version__} on {found}"


def outcome(file: str) -> dict[str, Any]:
    """Run the tests of a file in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", file]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **SETTINGS}
    )
    *_, last = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    status = "failed" if done.returncode else "passed"
    return {"status": status, "message": last, "failures": failed}


def summary(rows: list[dict[str, Any]]) -> str:
    """Write a line per file, and the first tests that failed."""
    table = [[row["file"], row["status"], row["message"]] for row in rows]
    lines = [f"over {rows[0]['library']}", format_table(["tests", "status", "outcome"], table)]
    return "\n".join([*lines, *(line for row in rows for line in row["failures"][:5])])
