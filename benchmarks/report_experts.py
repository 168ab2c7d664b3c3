"""The page's section on layers: tnmoe's experts beside other mixtures, in time and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from report_parts import (
    NONE,
    Kind,
    bold,
    bullets,
    counted,
    escaped,
    finite,
    first_case,
    format_ratio,
    is_above_one,
    network,
    ratio,
    smallest,
    table,
    tokens,
)

BASELINES = ("Switch loop", "grouped_mm")
MEASURES = {
    "infer": "inference",
    "train": "training",
    "peak bytes": "memory",
}

LEGEND = """\
The benchmark runs whole layers on the same tokens, and the layers take turns.

- *Inference* is a forward pass, *training* a forward and a backward pass.
- *Memory* is the peak of a training step in a new process, above the memory in use before the layer
  was made.
- *Weights* is the number of weights that a layer holds. A layer with fewer can express less.

All figures are ratios to the **best MoE**, the better of transformers' two ordinary mixtures in the
same case. Weights are random: the figures are about time and memory, and say nothing about what a
layer learns.

- **Switch loop**, **grouped\\_mm**: transformers' ordinary mixtures, in which every expert is a
  separate network: its Switch experts in a loop, and its grouped products on stacked weights.
- **dense FFN**: one network for all tokens. It is not a mixture, and stands here for orientation.
- **tnmoe exact**, **bond B**: this library. Every matrix is a chain of small tensors, its cores.
  The experts share the central core, and each expert owns its other cores. The bonds between cores
  are as large as any matrix needs, or at most B.
- **tnmoe split G**: the same with output legs to the left and input legs to the right of the
  central core, in groups of G. No expert's matrix is ever built.
- **published exact**, **bond B**: the same mixture as its paper describes it (MPOE,
  arXiv:2203.01104): every forward pass rebuilds every expert core by core. Written for this
  benchmark.
- **torchTT**, **tensorly-torch bond B**: the factorised layers of these libraries, one per expert
  and matrix. The experts share nothing.

The name of a case holds the sizes of the network (768x3072: tokens of 768 numbers, 3072 hidden
units), whether it is gated, the number of experts and the number of tokens. Every token goes to one
expert, chosen at random. At inference, tnmoe may build the experts' matrices once and keep them, in
as much memory as an ordinary mixture needs. The layer then computes what that mixture computes, so
many ratios are near 1."""


def losses(result: dict[str, Any]) -> str:
    """List the cases in which tnmoe's best layer is behind, and count them for every layer."""
    cases = [each for each in _measured(result) if _best(*each)]
    if not cases:
        return "No case has an ordinary mixture to compare with."
    behind = [f"{_name(*each)}: {_leader(*each)}" for each in cases if _all_behind(*each)]
    count = f"{len(behind)} of {len(cases)}"
    lines = [
        f"In {count} cases even the best of tnmoe's layers is behind the *best MoE*, the better of "
        "transformers' two ordinary mixtures.",
        bullets(behind),
        "For every layer, the cases in which it is behind, and the worst ratio (all are listed "
        "below):",
        _by_layer(cases),
    ]
    return "\n\n".join(filter(None, lines))


def body(result: dict[str, Any]) -> str:
    """Write the tables of all ratios, and a list of all cases in which a peer is ahead."""
    listed = bullets(filter(None, (_all_losses(*each) for each in _measured(result))))
    return "\n\n".join(
        [
            f"{_turns(result)}**Bold**: a layer of tnmoe that is behind the best MoE. "
            "–: not measured.",
            *_tables(result),
            "**Every case in which a peer is ahead of a layer of tnmoe**, with the ratio to the "
            "best MoE, or to the named layer of the same bond:",
            listed or "- none",
        ]
    )


def _measured(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every case with every measure that any of its layers has."""
    for case in result["cases"]:
        for measure in MEASURES:
            if any(measure in row for row in case["layers"].values()):
                yield case, measure


def _turns(result: dict[str, Any]) -> str:
    """Say how many turns the medians are taken over; memory needs no turns."""
    figures = [row.get(mode) for case, mode in _measured(result) for row in case["layers"].values()]
    timed = [figure for figure in figures if isinstance(figure, dict)]
    turns = max((len(figure.get("seconds", ())) for figure in timed), default=0)
    return f"Medians of {counted(turns, 'turn')}. " if turns else ""


def _value(case: dict[str, Any], name: str, measure: str) -> float | None:
    given = case["layers"].get(name, {}).get(measure)
    return finite(given.get("median s") if isinstance(given, dict) else given)


def _note(case: dict[str, Any], name: str, measure: str) -> str:
    row = case["layers"].get(name, {})
    given = row.get(measure)
    note = (given if isinstance(given, dict) else row).get("note")
    return escaped(note) if note else NONE


def _best(case: dict[str, Any], measure: str) -> float | None:
    return smallest(_value(case, name, measure) for name in BASELINES)


def _to_best(case: dict[str, Any], name: str, measure: str) -> float | None:
    return ratio(_value(case, name, measure), _best(case, measure))


def _ours(case: dict[str, Any]) -> list[str]:
    return [name for name in case["layers"] if name.startswith("tnmoe")]


def _is_behind(case: dict[str, Any], name: str, measure: str) -> bool:
    """Compare a layer with the best MoE; a layer without a figure counts as behind."""
    return _value(case, name, measure) is None or is_above_one(_to_best(case, name, measure))


def _all_behind(case: dict[str, Any], measure: str) -> bool:
    return bool(_ours(case)) and all(_is_behind(case, name, measure) for name in _ours(case))


def _leader(case: dict[str, Any], measure: str) -> str:
    """Name tnmoe's best layer of a case, with its ratio."""
    ratios = {name: _to_best(case, name, measure) for name in _ours(case)}
    best = smallest(ratios.values())
    names = (escaped(name) for name, value in ratios.items() if value == best)
    return "no figure" if best is None else f"{next(names)} {format_ratio(best)}"


def _by_layer(cases: list[tuple[dict[str, Any], str]]) -> str:
    """Tabulate for every layer and measure how often it is behind, and its worst ratio."""
    names = dict.fromkeys(name for case, _ in cases for name in _ours(case))
    measures = dict.fromkeys(measure for _, measure in cases)
    headers = [f"behind in {MEASURES[measure]} (worst ratio)" for measure in measures]
    return table(
        ["layer", *headers],
        [
            [escaped(name), *(_tally(cases, name, measure) for measure in measures)]
            for name in names
        ],
    )


def _tally(cases: list[tuple[dict[str, Any], str]], name: str, measure: str) -> str:
    there = [case for case, what in cases if what == measure and name in case["layers"]]
    worst = max((_to_best(case, name, measure) or 0.0 for case in there), default=0.0)
    behind = sum(_is_behind(case, name, measure) for case in there)
    return f"{behind} of {len(there)} ({format_ratio(worst or None)})"


def _all_losses(case: dict[str, Any], measure: str) -> str:
    """Write one line with every layer that is behind a peer; empty if no layer is."""
    texts = []
    for name in _ours(case):
        if _is_behind(case, name, measure):
            texts.append(f"{escaped(name)} {_cell(case, name, measure)}")
        for peer in case["layers"]:
            same_bond = peer.endswith(name.removeprefix("tnmoe"))
            value = ratio(_value(case, name, measure), _value(case, peer, measure))
            if peer not in _ours(case) and same_bond and is_above_one(value):
                texts.append(f"{escaped(name)} **{format_ratio(value)} × {escaped(peer)}**")
    return f"{_name(case, measure)}: {', '.join(texts)}" if texts else ""


def _group(case: dict[str, Any]) -> tuple[str, bool, int]:
    return case["ffn"], case["gated"], case["experts"]


def _name(case: dict[str, Any], measure: str) -> str:
    return f"{network(case)}, {tokens(case)}, {MEASURES[measure]}"


def _tables(result: dict[str, Any]) -> Iterator[str]:
    """Yield a table per network, number of experts and measure: layers down, tokens across."""
    for _, group in groupby(result["cases"], key=_group):
        cases = list(group)
        for measure in dict.fromkeys(measure for _, measure in _measured({"cases": cases})):
            yield f"{network(cases[0])}: **{MEASURES[measure]}** / best MoE"
            yield _table(cases, measure)


def _table(cases: list[dict[str, Any]], measure: str) -> str:
    names = dict.fromkeys(name for case in cases for name in case["layers"])
    # The number of weights does not depend on the tokens: take the first case that has it.
    known = [case for case in cases if _best(case, "weight bytes")][:1]
    return table(
        ["layer", *(["weights"] * len(known)), *map(tokens, cases)],
        [
            [
                escaped(name),
                *(format_ratio(_to_best(case, name, "weight bytes")) for case in known),
                *(_cell(case, name, measure) for case in cases),
            ]
            for name in names
        ],
    )


def _cell(case: dict[str, Any], name: str, measure: str) -> str:
    value = _to_best(case, name, measure)
    if value is None:
        return _note(case, name, measure)
    return bold(format_ratio(value), name.startswith("tnmoe") and is_above_one(value))


EXPERTS = Kind(
    title="Layers of experts beside other mixtures",
    legend=LEGEND,
    packages=("tnmoe", "transformers", "torchTT", "tensorly-torch", "torch"),
    fits=lambda result: "layers" in first_case(result),
    losses=losses,
    body=body,
)
