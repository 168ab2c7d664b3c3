"""The page's section on layers: tnmoe's experts beside other mixtures, in time and in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

BASELINES = ("Switch loop", "eager", "batched_mm", "grouped_mm")
DENSE = "dense FFN"
MEASURES = {
    "infer": "inference",
    "train": "training",
    "peak bytes": "memory",
}
# Counted and not measured, so no case is lost or won by it.
READ = {"bytes per token": "weights read"}

# What ratios refer to: the value of a case and a measure.
Reference = Callable[[dict[str, Any], str], float | None]

LEGEND = """\
The benchmark runs whole layers on the same tokens, and the layers take turns.

- *Inference* is a forward pass, *training* a forward and a backward pass.
- *Memory* is the peak of a training step in a new process, above the memory in use before the layer
  was made.
- *Weights* is the number of weights that a layer holds. A layer with fewer can express less.
- *Weights read* is the number of weights that a call needs: those that experts share, and those of
  the experts that have tokens. Where a layer builds matrices from its weights and keeps them, it
  reads those instead.

All figures are ratios, to the **best MoE** in one table and to the dense FFN in the next. The best
MoE is the best of transformers' ordinary mixtures in the same case. Weights are random: the figures
are about time and memory, and say nothing about what a layer learns.

- **Switch loop**, **eager**, **batched\\_mm**, **grouped\\_mm**: transformers' ordinary mixtures,
  in which every expert is a separate network: its Switch experts in a loop, and its three ways to
  compute stacked weights. They loop over experts, copy the matrices of every token's experts into
  one batch of products, or use grouped products.
- **dense FFN**: one network for all tokens. It is not a mixture, and an ordinary mixture has the
  work of one such network for every expert that a token visits.
- **tnmoe exact**, **bond B**: this library. Every matrix is a chain of small tensors, its cores.
  The experts share the central core, and each expert owns its other cores. The bonds between cores
  are as large as any matrix needs, or at most B.
- **tnmoe split G**: the same with output legs to the left and input legs to the right of the
  central core, in groups of G. No expert's matrix is ever built.
- **tnmoe hidden G**: experts own legs on the hidden side only, in groups of G. The central core
  acts once per token, however many experts the token visits.
- **tnmoe residual B**, **B, N sites**: a common matrix, which also acts once per token, plus an MPO
  of bond B for every expert, of two sites or of N.
- **published exact**, **bond B**: the same mixture as its paper describes it (MPOE,
  arXiv:2203.01104): every forward pass rebuilds every expert core by core. Written for this
  benchmark.
- **torchTT**, **tensorly-torch bond B**: the factorised layers of these libraries, one per expert
  and matrix. The experts share nothing.

The name of a case holds the sizes of the network (768x3072: tokens of 768 numbers, 3072 hidden
units), whether it is gated, the number of experts and the number of tokens. Every token goes to one
expert, or with *top-k* to k different ones, chosen at random. At inference, tnmoe may build the
experts' matrices once and keep them, in as much memory as an ordinary mixture needs. The layer then
computes what that mixture computes. Many ratios are therefore near 1."""


def losses(result: dict[str, Any]) -> str:
    """List the cases in which tnmoe's best layer is behind, and count them for every layer."""
    cases = [each for each in _measured(result) if _best(*each)]
    if not cases:
        return "No case has an ordinary mixture to compare with."
    behind = [f"{_name(*each)}: {_leader(*each)}" for each in cases if _all_behind(*each)]
    count = f"{len(behind)} of {len(cases)}"
    lines = [
        f"In {count} cases even the best of tnmoe's layers is behind the *best MoE*, the best of "
        "transformers' ordinary mixtures.",
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
            *_summary(result),
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


def _dense(case: dict[str, Any], measure: str) -> float | None:
    return _value(case, DENSE, measure)


def _ratio(
    case: dict[str, Any], name: str, measure: str, reference: Reference = _best
) -> float | None:
    return ratio(_value(case, name, measure), reference(case, measure))


def _ours(case: dict[str, Any]) -> list[str]:
    return [name for name in case["layers"] if name.startswith("tnmoe")]


def _is_behind(case: dict[str, Any], name: str, measure: str) -> bool:
    """Compare a layer with the best MoE; a layer without a figure counts as behind."""
    return _value(case, name, measure) is None or is_above_one(_ratio(case, name, measure))


def _all_behind(case: dict[str, Any], measure: str) -> bool:
    return bool(_ours(case)) and all(_is_behind(case, name, measure) for name in _ours(case))


def _leader(case: dict[str, Any], measure: str) -> str:
    """Name tnmoe's best layer of a case, with its ratio."""
    ratios = {name: _ratio(case, name, measure) for name in _ours(case)}
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
    worst = max((_ratio(case, name, measure) or 0.0 for case in there), default=0.0)
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


def _group(case: dict[str, Any]) -> tuple[str, bool, int, int]:
    return case["ffn"], case["gated"], case["experts"], case.get("top_k", 1)


def _name(case: dict[str, Any], measure: str) -> str:
    return f"{network(case)}, {tokens(case)}, {MEASURES[measure]}"


def _summary(result: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the largest ratios to the dense FFN, by the number of experts per token."""
    found = [each for each in _measured(result) if "top_k" in each[0] and _dense(*each)]
    columns = dict.fromkeys((measure, case["top_k"]) for case, measure in found)
    names = dict.fromkeys(name for case, _ in found for name in case["layers"])
    if not found:
        return

    def worst(name: str, column: tuple[str, int]) -> str:
        ratios = [
            _ratio(case, name, measure, _dense) or 0.0
            for case, measure in found
            if (measure, case["top_k"]) == column
        ]
        return format_ratio(max(ratios, default=0.0) or None)

    yield "The largest ratio to the dense FFN, by the number of experts per token:"
    yield table(
        ["layer", *(f"{MEASURES[measure]}, top-{top_k}" for measure, top_k in columns)],
        [[escaped(name), *(worst(name, column) for column in columns)] for name in names],
    )


def _tables(result: dict[str, Any]) -> Iterator[str]:
    """Yield tables per network, number of experts and measure: layers down, tokens across."""
    for _, group in groupby(result["cases"], key=_group):
        cases = list(group)
        measures = dict.fromkeys(measure for _, measure in _measured({"cases": cases}))
        for measure in (*measures, *READ):
            for reference, label in ((_best, "best MoE"), (_dense, DENSE)):
                if any(reference(case, measure) for case in cases):
                    yield f"{network(cases[0])}: **{(MEASURES | READ)[measure]}** / {label}"
                    yield _table(cases, measure, reference)


def _table(cases: list[dict[str, Any]], measure: str, reference: Reference) -> str:
    names = dict.fromkeys(name for case in cases for name in case["layers"])
    # The number of weights does not depend on the tokens: take the first case that has it.
    known = [case for case in cases if reference(case, "weight bytes")][:1]
    return table(
        ["layer", *(["weights"] * len(known)), *map(tokens, cases)],
        [
            [
                escaped(name),
                *(format_ratio(_ratio(case, name, "weight bytes", reference)) for case in known),
                *(_cell(case, name, measure, reference) for case in cases),
            ]
            for name in names
        ],
    )


def _cell(case: dict[str, Any], name: str, measure: str, reference: Reference = _best) -> str:
    value = _ratio(case, name, measure, reference)
    if value is None:
        return _note(case, name, measure)
    is_lost = reference is _best and name.startswith("tnmoe") and is_above_one(value)
    return bold(format_ratio(value), is_lost)


EXPERTS = Kind(
    title="Layers of experts beside other mixtures",
    legend=LEGEND,
    packages=("tnmoe", "transformers", "torchTT", "tensorly-torch", "torch"),
    fits=lambda result: "layers" in first_case(result),
    losses=losses,
    body=body,
)
