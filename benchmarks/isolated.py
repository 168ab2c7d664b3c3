"""Large cases with one process per library, which may run out of time or memory alone."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import Case, taking_part
from library import Library


def run_isolated(
    case: Case, libs: list[Library], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per library; the libraries run one after another and take no turns."""
    return [
        _run_one(case, library, options) for library in taking_part(case, libs, options.libraries)
    ]


def _run_one(case: Case, library: Library, options: argparse.Namespace) -> dict[str, Any]:
    """Run one library on a case in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        request = {
            "case": case.name,
            "library": library.name,
            "answer": str(answer),
            "device": options.device,
            "dtype": options.dtype,
            "matrix": options.matrix,
            "repeats": options.repeats or 3,
            "limit": options.limit,
            "memory": options.memory,
        }
        worker = Path(__file__).with_name("worker.py")
        done = subprocess.run(
            [sys.executable, str(worker), json.dumps(request)], capture_output=True, text=True
        )
        # The worker writes after every call, so its finished calls count.
        row = {"library": library.name, "seconds": []}
        if answer.exists():
            row = json.loads(answer.read_text())
        if not row["seconds"]:
            row.setdefault("note", _reason(done))
        return row


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Say in a few words why a worker ended without a time."""
    if done.returncode == -signal.SIGALRM:
        return "over the time limit"
    if done.returncode in (-9, 137) or "memory" in done.stderr.lower():
        return "out of memory"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"fails: {lines[-1][:90]}"
