"""The page's section on algebra: one table of ratios, the losses, then every case."""

from __future__ import annotations

from typing import Any

from report_parts import (
    NONE,
    Kind,
    bold,
    collapsible,
    counted,
    escaped,
    finite,
    first_case,
    format_count,
    format_error,
    format_ratio,
    is_below_one,
    ratio,
    smallest,
    table,
)

LEGEND = """\
Each case is one operation on **matrix product operators** (MPOs, also called TT-matrices). An MPO
writes a matrix as a chain of small tensors, its cores; here there are five. The *bonds*, the sizes
that neighbouring cores have in common, determine how many numbers the cores hold and how close to
the matrix they come.

- **decompose … exact**, **bond 64**, **rtol 1e-2**: a dense matrix becomes an MPO without any
  truncation, with bonds of at most 64, or with as few parameters as a relative error of 1 % allows.
  The matrix has bonds of 48 with decay, under 0.5 % of noise (or is *gaussian*, where the run says
  so).
- **sum of 8 …**: eight MPOs of bond 32 with a common part become one, truncated in the same ways.
- **product … bond 16\\*16 to 64**: the product of two MPOs of bond 16, truncated to bond 64.
- **apply … to B**: an MPO times B vectors.
- **norm**, **inner**: the norm and the inner product of MPOs of bond 64.

The libraries take turns on the same inputs with the same number of threads. The 14336x4096 cases
run one library after another, each in a new process.

- **tnmoe numpy**, **tnmoe torch**: this library, on NumPy arrays and on torch tensors.
- **tensorly**, **quimb**, **torchTT**, **tntorch**: with their documented defaults.
- **quimb fast**, **tntorch fast**: their faster, less accurate algorithms: Gram matrices instead of
  singular value decompositions (`method="eig"`, `algorithm="eig"`), and zip-up products.
- **tensorly random**, **quimb random**: their randomized algorithms, for fixed bonds only.

The error of a result is relative, in the Frobenius norm, against the dense answer in double
precision. A result is *accurate enough* if its error is

- within the tolerance, where the case has one,
- within 1 % of the best error of the case, where the case fixes a bond,
- within rounding otherwise: 1e-05 in single precision.

A result with more parameters (numbers in its cores) loses no points for them: compare them as well.
*Floor* is the time that the dense products or copies of the standard algorithm would take at the
machine's rates in the same run: a yardstick, not a proven bound."""


def losses(result: dict[str, Any]) -> str:
    """Count the cases in which tnmoe is ahead, and list those in which a peer is faster."""
    cases = result["cases"]
    behind = [row for case in cases for row in _faster_peers(case)]
    ahead = sum(_best(case) is not None and not _faster_peers(case) for case in cases)
    turns = max((len(row.get("seconds", ())) for case in cases for row in _rows(case)), default=0)
    lines = [
        f"Medians of {counted(turns, 'turn')}. "
        f"In {ahead} of {len(cases)} cases no peer that is accurate enough is faster than tnmoe, "
        "neither on NumPy nor on torch."
    ]
    if behind:
        headers = ("a peer is faster", "peer", "its time / tnmoe numpy", "its time / tnmoe torch",
                   "its error (tnmoe's)", "its parameters (tnmoe's)")  # fmt: skip
        lines.append(table(headers, behind))
    inaccurate = [text for case in cases for text in _faster_but_inaccurate(case)]
    if inaccurate:
        lines.append(
            "These results also beat tnmoe's faster library, but are too inaccurate to count: "
            f"{'; '.join(inaccurate)}."
        )
    return "\n\n".join(lines)


def body(result: dict[str, Any]) -> str:
    """Write the table of all ratios, and a table for every case."""
    libraries = list(
        dict.fromkeys(row["library"] for case in result["cases"] for row in _rows(case))
    )
    overview = table(
        ["time / tnmoe's faster library", *map(escaped, libraries)],
        [[escaped(case["case"]), *_overview(case, libraries)] for case in result["cases"]],
    )
    legend = (
        "**Bold**: this peer is faster than tnmoe's faster library. (In brackets): the result is "
        "less accurate than the case allows, and is not compared. –: there is no figure. The table "
        "of the case below says why, or omits a variant that works as its library does."
    )
    return "\n\n".join([overview, legend, *map(_details, result["cases"])])


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    return case["rows"]


def _ours(row: dict[str, Any]) -> bool:
    return row["library"].startswith("tnmoe")


def _good(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with a time and a result that is accurate enough."""
    return [row for row in _rows(case) if row.get("good") and finite(row.get("median s"))]


def _best(case: dict[str, Any]) -> float | None:
    """Return the median of tnmoe's faster library."""
    return smallest(row["median s"] for row in _good(case) if _ours(row))


def _faster_peers(case: dict[str, Any]) -> list[list[str]]:
    """Return a line for each peer that beats tnmoe, or that has a result where tnmoe has none."""
    ours = {row["library"]: row for row in _good(case) if _ours(row)}
    lines = []
    for peer in _good(case):
        ratios = {name: ratio(peer["median s"], row["median s"]) for name, row in ours.items()}
        if _ours(peer) or (ours and not any(map(is_below_one, ratios.values()))):
            continue
        cells = [
            bold(format_ratio(ratios[name]), is_below_one(ratios[name]))
            if name in ours
            else "no result"
            for name in ("tnmoe numpy", "tnmoe torch")
        ]
        mine = min(ours.values(), key=lambda row: row["median s"], default={})
        error = f"{format_error(peer.get('error'))} ({format_error(mine.get('error'))})"
        size = f"{format_count(peer.get('params'))} ({format_count(mine.get('params'))})"
        cells += [error, NONE if peer.get("params") is None else size]
        lines.append([escaped(case["case"]), escaped(peer["library"]), *cells])
    return lines


def _faster_but_inaccurate(case: dict[str, Any]) -> list[str]:
    """Describe each peer that beats tnmoe with a result that is too inaccurate."""
    texts = []
    for row in _rows(case):
        value = ratio(row.get("median s"), _best(case))
        if not _ours(row) and not row.get("good") and is_below_one(value):
            error, bar = format_error(row.get("error")), format_error(case.get("acceptable error"))
            name = f"{escaped(case['case'])}, {escaped(row['library'])}"
            texts.append(f"{name} {format_ratio(value)} (error {error}, allowed {bar})")
    return texts


def _overview(case: dict[str, Any], libraries: list[str]) -> list[str]:
    """Return the cells of a case in the table of all ratios."""
    rows = {row["library"]: row for row in _rows(case)}
    cells = []
    for library in libraries:
        row = rows.get(library, {})
        value = ratio(row.get("median s"), _best(case))
        if value is None:
            cells.append(NONE)
        elif not row.get("good"):
            cells.append(f"({format_ratio(value)})")
        else:
            cells.append(bold(format_ratio(value), is_below_one(value) and not _ours(row)))
    return cells


def _details(case: dict[str, Any]) -> str:
    """Write the table of one case, which opens with a click."""
    best, floor = _best(case), case.get("floor s")
    lines = []
    for row in _rows(case):
        median = row.get("median s")
        note = row.get("note") or ("" if finite(median) else "no time was recorded")
        lines.append(
            [
                escaped(row["library"]),
                format_error(row.get("error")),
                format_count(row.get("params")),
                format_ratio(ratio(median, best)),
                format_ratio(ratio(median, floor)),
                escaped(note),
            ]
        )
    headers = ("library", "relative error", "parameters", "time / tnmoe", "time / floor", "remark")
    return collapsible(case["case"], table(headers, lines))


ALGEBRA = Kind(
    title="Algebra beside other libraries",
    legend=LEGEND,
    packages=("tnmoe", "tensorly", "quimb", "torchTT", "tntorch", "numpy", "torch"),
    fits=lambda result: "rows" in first_case(result),
    losses=losses,
    body=body,
)
