"""The results of experts.py on the page: layers beside other mixtures, in time and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from report_parts import (
    NONE,
    Kind,
    above,
    bold,
    bullets,
    first_case,
    least,
    many,
    network,
    number,
    plain,
    ratio,
    table,
    times,
    tokens,
)

BASELINES = ("Switch loop", "grouped_mm")
MEASURES = {
    "infer": "inference",
    "train": "training",
    "peak bytes": "memory",
}

LEGEND = """\
Whole layers on the same tokens. *Inference* is a forward pass, *training* a forward and a backward
pass, taking turns with the other layers; *memory* is the most that a training step in a process of
its own has in use, above what was in use before the layer was made. All are ratios to the **best
MoE**, the better of transformers' two ordinary mixtures in the same case. *Weights* compares in the
same way how many numbers a layer holds; one that holds fewer can express less. Weights are random:
this is about time and memory, not about what layers learn.

- **Switch loop**, **grouped\\_mm**: transformers' ordinary mixtures, in which every expert is a
  network of its own: its Switch experts in a loop, and its grouped products on stacked weights.
- **dense FFN**: one network for all tokens. No mixture; it is here for orientation.
- **tnmoe exact**, **bond B**: this library. Every matrix is a chain of small tensors, the cores;
  the experts share the central one, and each has the others to itself. The bonds between the cores
  are as large as any matrix needs, or at most B.
- **tnmoe split G**: the same with output legs left and input legs right of the central core, in
  groups of G; no expert's matrix is ever built.
- **published exact**, **bond B**: the same mixture as its paper describes it (MPOE,
  arXiv:2203.01104), every expert rebuilt core by core at every forward; written for this benchmark.
- **torchTT**, **tensorly-torch bond B**: those libraries' factorised layers, one per expert and
  matrix. Nothing is shared.

A case is named by the sizes of the network (768x3072: tokens of 768 numbers, 3072 inside), whether
it is gated, the number of experts and the number of tokens. Every token goes to one expert, chosen
at random. At inference tnmoe may build the experts' matrices once and keep them, which takes an
ordinary mixture's memory; the layer then does what that mixture does: hence many ratios near 1."""


def losses(result: dict[str, Any]) -> str:
    """Where even tnmoe's best layer is behind, and how often each of its layers is."""
    cases = [each for each in _measured(result) if _best(*each)]
    if not cases:
        return "No case has an ordinary mixture to compare with."
    behind = [f"{_name(*each)}: {_leader(*each)}" for each in cases if _all_behind(*each)]
    count = f"{len(behind)} of {len(cases)}"
    lines = [
        f"In {count} cases even the best of tnmoe's layers is behind the *best MoE*, the better of "
        "transformers' two ordinary mixtures.",
        bullets(behind),
        "In how many cases each layer is behind, and the worst ratio (all are listed below):",
        _by_layer(cases),
    ]
    return "\n\n".join(filter(None, lines))


def body(result: dict[str, Any]) -> str:
    listed = bullets(filter(None, (_all_losses(*each) for each in _measured(result))))
    return "\n\n".join(
        [
            f"{_turns(result)}**Bold**: a layer of tnmoe that is behind the best MoE. "
            "–: not measured.",
            *_tables(result),
            "**Every case in which a peer is ahead of a layer of tnmoe**, with the ratio to the "
            "best MoE, or to the layer of the same bond that is named:",
            listed or "- none",
        ]
    )


def _measured(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every case with every measure that any of its layers has."""
    for case in result["cases"]:
        for measure in MEASURES:
            if any(measure in row for row in case["layers"].values()):
                yield case, measure


def _turns(result: dict[str, Any]) -> str:
    """How many turns the medians are of; empty for memory, which needs none."""
    figures = [row.get(mode) for case, mode in _measured(result) for row in case["layers"].values()]
    timed = [figure for figure in figures if isinstance(figure, dict)]
    turns = max((len(figure.get("seconds", ())) for figure in timed), default=0)
    return f"Medians of {many(turns, 'turn')}. " if turns else ""


def _value(case: dict[str, Any], name: str, measure: str) -> float | None:
    given = case["layers"].get(name, {}).get(measure)
    return number(given.get("median s") if isinstance(given, dict) else given)


def _note(case: dict[str, Any], name: str, measure: str) -> str:
    row = case["layers"].get(name, {})
    given = row.get(measure)
    note = (given if isinstance(given, dict) else row).get("note")
    return plain(note) if note else NONE


def _best(case: dict[str, Any], measure: str) -> float | None:
    return least(_value(case, name, measure) for name in BASELINES)


def _to_best(case: dict[str, Any], name: str, measure: str) -> float | None:
    return ratio(_value(case, name, measure), _best(case, measure))


def _ours(case: dict[str, Any]) -> list[str]:
    return [name for name in case["layers"] if name.startswith("tnmoe")]


def _is_behind(case: dict[str, Any], name: str, measure: str) -> bool:
    """A layer without a figure is behind as well."""
    return _value(case, name, measure) is None or above(_to_best(case, name, measure))


def _all_behind(case: dict[str, Any], measure: str) -> bool:
    return bool(_ours(case)) and all(_is_behind(case, name, measure) for name in _ours(case))


def _leader(case: dict[str, Any], measure: str) -> str:
    """tnmoe's best layer of a case and its ratio."""
    ratios = {name: _to_best(case, name, measure) for name in _ours(case)}
    best = least(ratios.values())
    names = (plain(name) for name, value in ratios.items() if value == best)
    return "no figure" if best is None else f"{next(names)} {times(best)}"


def _by_layer(cases: list[tuple[dict[str, Any], str]]) -> str:
    """Layers down; per measure in how many cases each is behind, and its worst ratio."""
    names = dict.fromkeys(name for case, _ in cases for name in _ours(case))
    measures = dict.fromkeys(measure for _, measure in cases)
    headers = [f"behind in {MEASURES[measure]} (worst ratio)" for measure in measures]
    return table(
        ["layer", *headers],
        [[plain(name), *(_tally(cases, name, measure) for measure in measures)] for name in names],
    )


def _tally(cases: list[tuple[dict[str, Any], str]], name: str, measure: str) -> str:
    there = [case for case, what in cases if what == measure and name in case["layers"]]
    worst = max((_to_best(case, name, measure) or 0.0 for case in there), default=0.0)
    behind = sum(_is_behind(case, name, measure) for case in there)
    return f"{behind} of {len(there)} ({times(worst or None)})"


def _all_losses(case: dict[str, Any], measure: str) -> str:
    """One line with every layer that is behind a peer; empty where there is none."""
    texts = []
    for name in _ours(case):
        if _is_behind(case, name, measure):
            texts.append(f"{plain(name)} {_cell(case, name, measure)}")
        for peer in case["layers"]:
            same_bond = peer.endswith(name.removeprefix("tnmoe"))
            value = ratio(_value(case, name, measure), _value(case, peer, measure))
            if peer not in _ours(case) and same_bond and above(value):
                texts.append(f"{plain(name)} **{times(value)} × {plain(peer)}**")
    return f"{_name(case, measure)}: {', '.join(texts)}" if texts else ""


def _group(case: dict[str, Any]) -> tuple[str, bool, int]:
    return case["ffn"], case["gated"], case["experts"]


def _name(case: dict[str, Any], measure: str) -> str:
    return f"{network(case)}, {tokens(case)}, {MEASURES[measure]}"


def _tables(result: dict[str, Any]) -> Iterator[str]:
    """Per network, number of experts and measure: layers down, tokens across."""
    for _, group in groupby(result["cases"], key=_group):
        cases = list(group)
        for measure in dict.fromkeys(measure for _, measure in _measured({"cases": cases})):
            yield f"{network(cases[0])}: **{MEASURES[measure]}** / best MoE"
            yield _table(cases, measure)


def _table(cases: list[dict[str, Any]], measure: str) -> str:
    names = dict.fromkeys(name for case in cases for name in case["layers"])
    # Weights do not depend on the tokens, so any case that has them will do.
    known = [case for case in cases if _best(case, "weight bytes")][:1]
    return table(
        ["layer", *(["weights"] * len(known)), *map(tokens, cases)],
        [
            [
                plain(name),
                *(times(_to_best(case, name, "weight bytes")) for case in known),
                *(_cell(case, name, measure) for case in cases),
            ]
            for name in names
        ],
    )


def _cell(case: dict[str, Any], name: str, measure: str) -> str:
    value = _to_best(case, name, measure)
    if value is None:
        return _note(case, name, measure)
    return bold(times(value), name.startswith("tnmoe") and above(value))


EXPERTS = Kind(
    title="Layers of experts beside other mixtures",
    legend=LEGEND,
    packages=("tnmoe", "transformers", "torchTT", "tensorly-torch", "torch"),
    fits=lambda result: "layers" in first_case(result),
    losses=losses,
    body=body,
)
