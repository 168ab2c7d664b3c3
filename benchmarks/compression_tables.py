"""Tables of the benchmark of compression: what methods lose at equal numbers, and at equal bytes.

python benchmarks/compression_tables.py benchmarks/results/compression/small-….json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Run = dict[str, Any]


def main() -> None:
    """Print all tables of a result file."""
    runs = json.loads(Path(sys.argv[1]).read_text())["models"]
    for model in dict.fromkeys(run["model"] for run in runs):
        own = of_model(runs, model)
        print(f"{model}, {len(own)} seeds\n")
        print(markdown(*by_numbers(own)), end="\n\n")
        if any("healed" in case for run in own for case in run["cases"]):
            print("healed\n")
            print(markdown(*by_numbers(own, "healed")), end="\n\n")
        print(markdown(*by_bytes(own)), end="\n\n")


def of_model(runs: Iterable[Run], model: str) -> list[Run]:
    """Return the runs of a model, a seed each."""
    return [run for run in runs if run["model"] == model]


def increases(
    runs: Sequence[Run], method: str, share: float, loss: str = "loss"
) -> list[float] | None:
    """Return by how much the held-out loss of each seed rises; None if a run is missing.

    With ``"healed"`` as ``loss``, compressed models and the original trained equally before.
    """
    found = []
    for run in runs:
        losses = {(case["method"], case["share"]): case.get(loss) for case in run["cases"]}
        after, before = losses.get((method, share)), losses["original", 1.0]
        if after is None or before is None:
            return None
        found.append(after - before)
    return found


def by_numbers(runs: Sequence[Run], loss: str = "loss") -> tuple[list[str], list[list[str]]]:
    """Return the methods that round nothing, least loss first, and their increases by share."""
    cases = runs[0]["cases"]
    measured = {case["share"] for case in cases if case["method"] == "tnmoe" and loss in case}
    shares = sorted(measured, reverse=True)
    rows = []
    for method in dict.fromkeys(case["method"] for case in cases):
        values = [increases(runs, method, share, loss) for share in shares]
        if all(values):
            rows.append((method, [fmean(each) for each in values if each]))
    rows.sort(key=lambda row: sum(row[1]))
    return (
        ["method", *(_percent(share, 0) for share in shares)],
        [[name, *map(_change, values)] for name, values in rows],
    )


def by_bytes(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return all methods with at most 60 % of the bytes that none of fewer bytes outdoes."""
    rows = []
    for case in runs[0]["cases"]:
        found = increases(runs, case["method"], case["share"])
        if found and case["bytes"] <= 0.6:
            rows.append((case["bytes"], fmean(found), case["method"], case["numbers"]))
    best = [row for row in rows if not any(o[0] <= row[0] and o[1] < row[1] for o in rows)]
    return (
        ["bytes", "method", "numbers that stay", "loss"],
        [
            [_percent(size, 1), method, _percent(numbers, 0), _change(value)]
            for size, value, method, numbers in sorted(best, reverse=True)
        ],
    )


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def _change(value: float) -> str:
    text = f"{value:+.3f}".replace("-", "−")
    return text if text[1:] != "0.000" else "0.000"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, rule, *rows))


if __name__ == "__main__":
    main()
