"""One page from the results of the benchmarks: what is compared, where tnmoe loses, every ratio.

    python benchmarks/report.py            # all results/ except quick runs
    python benchmarks/report.py --quick    # quick runs
    python benchmarks/report.py FILE …     # these results

The page shows times only as ratios of medians within one run. Machines are noisy, so a time says
nothing about another run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from report_algebra import ALGEBRA
from report_checks import BUILDING, PLAN, SIZES
from report_experts import EXPERTS
from report_models import MODELS
from report_parts import Kind, counted, escaped

RESULTS = Path(__file__).parent / "results"
KINDS = (ALGEBRA, EXPERTS, MODELS, PLAN, BUILDING, SIZES)

INTRODUCTION = """\
# tnmoe beside its peers

`make bench` writes this page (`benchmarks/report.py`) from the results stored beside it; do not
edit it by hand. tnmoe writes the matrices of neural networks as tensor networks, and the experts of
a mixture share most of their numbers. This page compares its algebra and its layers with other
libraries.

- Every figure about time is a **ratio of two medians of the same run**. Machines are noisy, and
  only such ratios mean anything. A ratio within a few hundredths of 1 is a tie.
- Every run states its machine, commit and versions. A version that a run did not record is the one
  that `requirements/` pins in its commit.
- Errors, memory and numbers of parameters do not depend on how busy the machine was.

## Where tnmoe loses"""


class Run(NamedTuple):
    """One result file, written in words."""

    name: str
    kind: Kind
    environment: str
    losses: str
    body: str


def main() -> None:
    """Write the page from the given or the stored results."""
    options = parse_arguments()
    output = options.output or RESULTS / f"REPORT{'-quick' * options.quick}.md"
    files = options.files or stored(options.quick)
    if not files:
        raise SystemExit(f"no results in {RESULTS}: run `make bench` first")
    page = report([load(path) for path in files])
    output.write_text(page, encoding="utf-8")
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="results (default: those in results/)")
    parser.add_argument("--quick", action="store_true", help="the page of the quick runs")
    parser.add_argument("--output", type=Path, help="Markdown file")
    return parser.parse_args()


def stored(quick: bool) -> list[Path]:
    """List the results of whole or of quick runs, largest first; model sizes belong to both."""
    files = sorted(RESULTS.glob("*.json"), key=lambda path: (-path.stat().st_size, path.name))
    return [
        path
        for path in files
        if path.stem == "paper_sizes" or path.stem.endswith("-quick") == quick
    ]


def load(path: Path) -> Run:
    """Write a result in words; end the program with a message if the file is not a result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as JSON: {error}") from None
    try:
        kind = next(kind for kind in KINDS if kind.fits(result))
        words = environment(result, kind), kind.losses(result), kind.body(result)
    except (StopIteration, LookupError, TypeError, ValueError, AttributeError) as error:
        # Any part that a section misses shows that no benchmark wrote the file.
        raise SystemExit(
            f"{path} is no result of the benchmarks: expected a file of algebra.py, experts.py, "
            f"end_to_end.py or paper_sizes.py with at least one finished case ({error!r})"
        ) from None
    return Run(path.stem, kind, *words)


def environment(result: Any, kind: Kind) -> str:
    """Describe the machine and the versions of a run."""
    if not kind.packages:
        return "Counted: the same on every machine."
    given = result["environment"]
    options = {"dtype": result.get("dtype"), **result.get("options", {})}
    changes = " with uncommitted changes" * bool(given["uncommitted changes"])
    inputs = f", {options['matrix']} matrices" if "matrix" in options else ""
    hardware = escaped(given["cpu"] if given["device"] == "cpu" else given["device"])
    versions = given["versions"]
    unknown = [name for name in kind.packages if name not in versions]
    known = ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in versions.items())
    missing = f"; not recorded: {', '.join(unknown)}" * bool(unknown)
    processors = f"{counted(given['cores'], 'core')}, {counted(given['threads'], 'thread')}"
    return (
        f"{given['date']}, commit {given['commit'][:10] or 'unknown'}{changes}; "
        f"{hardware}, {processors}; {options['dtype']}{inputs}. "
        f"Versions: Python {given['python']}, {known}{missing}."
    )


def report(runs: list[Run]) -> str:
    """Write the page: the losses of all runs, then a chapter for each kind with all its runs."""
    losses = [
        f"### {run.name}: {run.kind.title.lower()}\n\n{run.losses}"
        for run in sorted(runs, key=lambda run: KINDS.index(run.kind))
        if run.losses
    ]
    chapters = [chapter(kind, runs) for kind in KINDS if any(run.kind is kind for run in runs)]
    return "\n\n".join([INTRODUCTION, *losses, *chapters]) + "\n"


def chapter(kind: Kind, runs: list[Run]) -> str:
    """Write the legend of a kind and all its runs."""
    parts = [
        f"### Run {run.name}\n\n{run.environment}\n\n{run.body}" for run in runs if run.kind is kind
    ]
    return "\n\n".join([f"## {kind.title}", kind.legend, *parts])


if __name__ == "__main__":
    main()
