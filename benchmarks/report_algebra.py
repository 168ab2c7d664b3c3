"""The results of algebra.py on the page: one table of ratios, the losses, then case by case."""

from __future__ import annotations

from typing import Any

from report_parts import (
    NONE,
    Kind,
    below,
    bold,
    count,
    first_case,
    folded,
    least,
    many,
    number,
    plain,
    ratio,
    scientific,
    table,
    times,
)

LEGEND = """\
One operation at a time on **matrix product operators** (MPOs, also called TT-matrices): a matrix
written as a chain of small tensors, its cores, here five. The *bonds*, the sizes that neighbours
have in common, decide how many numbers the cores hold and how close to the matrix they come.

- **decompose … exact**, **bond 64**, **rtol 1e-2**: a dense matrix becomes an MPO, with nothing
  cut, with bonds of at most 64, or with as few parameters as a relative error of 1 % allows. The
  matrix has bonds of 48 and decay, under 0.5 % of noise (or is *gaussian*, where the run says so).
- **sum of 8 …**: eight MPOs of bond 32 with a part in common become one, cut in the same ways.
- **product … bond 16\\*16 to 64**: the product of two MPOs of bond 16, cut to bond 64.
- **apply … to B**: an MPO times B vectors.
- **norm**, **inner**: of MPOs of bond 64.

The libraries, which take turns on the same inputs with the same number of threads (14336x4096: one
after another, each in a process of its own):

- **tnmoe numpy**, **tnmoe torch**: this library, on NumPy arrays and on torch tensors.
- **tensorly**, **quimb**, **torchTT**, **tntorch**: by their documented defaults.
- **quimb fast**, **tntorch fast**: their quicker and less accurate algorithms: Gram matrices in
  place of singular value decompositions (`method="eig"`, `algorithm="eig"`), zip-up products.
- **tensorly random**, **quimb random**: their randomized algorithms, for fixed bonds only.

A result is *accurate enough* if its error, relative and in the Frobenius norm against the dense
answer in double precision, is within the tolerance asked for; with a bond asked for, within 1 % of
the best error of the case; otherwise within rounding, 1e-05 in single precision. One with more
parameters, the numbers that its cores hold, is not marked down: compare them as well. *Floor* is
the time that the dense products or copies of the standard algorithm would take at the rates of the
machine in the same run: a yardstick, not a proven bound."""


def losses(result: dict[str, Any]) -> str:
    """How often tnmoe's faster library is ahead; every case in which a peer is, and by how much."""
    cases = result["cases"]
    behind = [row for case in cases for row in _faster_peers(case)]
    ahead = sum(_best(case) is not None and not _faster_peers(case) for case in cases)
    turns = max((len(row.get("seconds", ())) for case in cases for row in _rows(case)), default=0)
    lines = [
        f"Medians of {many(turns, 'turn')}. "
        f"In {ahead} of {len(cases)} cases no peer that is accurate enough is faster than tnmoe, "
        "be it on NumPy or on torch."
    ]
    if behind:
        headers = ("a peer is faster", "peer", "its time / tnmoe numpy", "its time / tnmoe torch",
                   "its error (tnmoe's)", "its parameters (tnmoe's)")  # fmt: skip
        lines.append(table(headers, behind))
    inaccurate = [text for case in cases for text in _faster_but_inaccurate(case)]
    if inaccurate:
        lines.append(
            "Faster than tnmoe's faster library too, but less accurate than the case allows: "
            f"{'; '.join(inaccurate)}."
        )
    return "\n\n".join(lines)


def body(result: dict[str, Any]) -> str:
    libraries = list(
        dict.fromkeys(row["library"] for case in result["cases"] for row in _rows(case))
    )
    overview = table(
        ["time / tnmoe's faster library", *map(plain, libraries)],
        [[plain(case["case"]), *_overview(case, libraries)] for case in result["cases"]],
    )
    legend = (
        "**Bold**: this peer is faster than tnmoe's faster library. (In brackets): its result is "
        "less accurate than the case allows, so it is not compared. –: no figure; the table of the "
        "case below says why, or does not list a variant that would do the same as its library."
    )
    return "\n\n".join([overview, legend, *map(_details, result["cases"])])


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    return case["rows"]


def _ours(row: dict[str, Any]) -> bool:
    return row["library"].startswith("tnmoe")


def _good(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with a time and a result that is accurate enough."""
    return [row for row in _rows(case) if row.get("good") and number(row.get("median s"))]


def _best(case: dict[str, Any]) -> float | None:
    """Of tnmoe's libraries the faster one's median."""
    return least(row["median s"] for row in _good(case) if _ours(row))


def _faster_peers(case: dict[str, Any]) -> list[list[str]]:
    """A line for every peer that beats a library of tnmoe, or has a result where tnmoe has none."""
    ours = {row["library"]: row for row in _good(case) if _ours(row)}
    lines = []
    for peer in _good(case):
        ratios = {name: ratio(peer["median s"], row["median s"]) for name, row in ours.items()}
        if _ours(peer) or (ours and not any(map(below, ratios.values()))):
            continue
        cells = [
            bold(times(ratios[name]), below(ratios[name])) if name in ours else "no result"
            for name in ("tnmoe numpy", "tnmoe torch")
        ]
        mine = min(ours.values(), key=lambda row: row["median s"], default={})
        error = f"{scientific(peer.get('error'))} ({scientific(mine.get('error'))})"
        size = f"{count(peer.get('params'))} ({count(mine.get('params'))})"
        cells += [error, NONE if peer.get("params") is None else size]
        lines.append([plain(case["case"]), plain(peer["library"]), *cells])
    return lines


def _faster_but_inaccurate(case: dict[str, Any]) -> list[str]:
    texts = []
    for row in _rows(case):
        value = ratio(row.get("median s"), _best(case))
        if not _ours(row) and not row.get("good") and below(value):
            error, bar = scientific(row.get("error")), scientific(case.get("acceptable error"))
            name = f"{plain(case['case'])}, {plain(row['library'])}"
            texts.append(f"{name} {times(value)} (error {error}, allowed {bar})")
    return texts


def _overview(case: dict[str, Any], libraries: list[str]) -> list[str]:
    rows = {row["library"]: row for row in _rows(case)}
    cells = []
    for library in libraries:
        row = rows.get(library, {})
        value = ratio(row.get("median s"), _best(case))
        if value is None:
            cells.append(NONE)
        elif not row.get("good"):
            cells.append(f"({times(value)})")
        else:
            cells.append(bold(times(value), below(value) and not _ours(row)))
    return cells


def _details(case: dict[str, Any]) -> str:
    best, floor = _best(case), case.get("floor s")
    lines = []
    for row in _rows(case):
        median = row.get("median s")
        note = row.get("note") or ("" if number(median) else "no time was recorded")
        lines.append(
            [
                plain(row["library"]),
                scientific(row.get("error")),
                count(row.get("params")),
                times(ratio(median, best)),
                times(ratio(median, floor)),
                plain(note),
            ]
        )
    headers = ("library", "relative error", "parameters", "time / tnmoe", "time / floor", "remark")
    return folded(case["case"], table(headers, lines))


ALGEBRA = Kind(
    title="Algebra beside other libraries",
    legend=LEGEND,
    packages=("tnmoe", "tensorly", "quimb", "torchTT", "tntorch", "numpy", "torch"),
    fits=lambda result: "rows" in first_case(result),
    losses=losses,
    body=body,
)
