"""The algebra's main cases on a GPU, part of gpu.py: beside NumPy on the machine's CPU."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from algebra import finish, run_case
from cases import Case, algebra, all_cases, decompositions
from library import Tnmoe, TnmoeTorch
from machine import copy_rate, gemm_rate

import tnmoe as tn
from tnmoe.system.tables import format_table

OPERATIONS = ("decompose", "apply", "norm")
DTYPE = "float32"


def rows(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the times and errors of every case."""
    options = Namespace(libraries=["*"], limit=10.0, repeats=1 if tiny else 3, dtype=DTYPE)
    rates = {"gemm flops/s": gemm_rate(DTYPE, device), "copy bytes/s": copy_rate(DTYPE, device)}
    libraries = [Tnmoe(), TnmoeTorch(device)]
    for case in small_cases() if tiny else all_cases(False, DTYPE, "structured"):
        if case.operation in OPERATIONS and not case.large:
            result = finish(case, run_case(case, libraries, options), rates, options)
            ours = next(row for row in result["rows"] if row["library"] == TnmoeTorch.name)
            yield result | {"status": "passed" if ours.get("good") else "failed"}


def small_cases() -> Iterator[Case]:
    """Yield the cases of a small matrix."""
    shape = tn.MPOShape.for_matrix(96, 64, sites=3)
    yield from decompositions(shape, DTYPE, "structured")
    yield from algebra(shape, DTYPE)


def summary(rows: list[dict[str, Any]]) -> str:
    """Write a table of times and errors, and how many times faster the GPU is."""
    lines = []
    for row in rows:
        by_name = {each["library"]: each for each in row["rows"]}
        numpy, torch = (by_name[each.name].get("median s") for each in (Tnmoe, TnmoeTorch))
        found = by_name[TnmoeTorch.name]
        lines.append([
            row["case"], f"{1e3 * torch:.3f}" if torch else found.get("note", "-"),
            f"{numpy / torch:.2f}" if numpy and torch else "-", f"{found.get('error', 0.0):.1e}",
        ])  # fmt: skip
    return format_table(["case", "torch ms", "NumPy / torch", "rel. error"], lines)
