"""The page's section on whole models: generation and a training step, dense and as mixtures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from report_parts import (
    NONE,
    Kind,
    bold,
    counted,
    escaped,
    finite,
    first_case,
    format_ratio,
    is_above_one,
    is_below_one,
    ratio,
    smallest,
    table,
)

DENSE = "dense"
ORDINARY = "ordinary top-2"

LEGEND = """\
One language model as it is and as several mixtures of 8 experts, in one run in which the variants
take turns. Every mixture starts as the dense model and computes the same function; routers are
random.

- *generate, batch B*: B prompts are continued greedily, with transformers' `generate`. *Compiled*:
  with its static cache, and with every decoding step compiled as one graph.
- *training step*: the forward and the backward pass of a batch, without the optimiser's step.

The figures are **tokens per second, divided by those of the dense model**: larger is faster.
*Parameters* are those of the whole model, also relative to the dense model.

- **ordinary top-k**: every expert is a separate network. Every token visits k experts.
- **hidden**, **residual top-k**: tnmoe's layouts that compute once per token what experts share."""


def losses(result: dict[str, Any]) -> str:
    """Count the cases in which a variant is slower than the dense model or an ordinary mixture."""
    names = [name for name in result["variants"] if name not in (DENSE, ORDINARY)]
    rows = [
        [escaped(name), _tally(result, name, DENSE), _tally(result, name, ORDINARY)]
        for name in names
    ]
    text = "The cases in which a variant is slower, and its smallest share of the other's speed:"
    return f"{text}\n\n{table(['variant', 'than dense', f'than {ORDINARY}'], rows)}" * bool(rows)


def body(result: dict[str, Any]) -> str:
    """Write the table of all variants and cases."""
    cases = result["cases"]
    rows = [
        [
            escaped(name),
            format_ratio(_parameters(result, name)),
            *(_cell(case, name, count) for case in cases),
        ]
        for name, count in result["variants"].items()
    ]
    headers = ["variant", "parameters", *(escaped(case["case"]) for case in cases)]
    return (
        f"Model: {escaped(result['model'])}. Medians of {counted(_turns(cases), 'turn')}. "
        "**Bold**: a layout of tnmoe that is slower than the ordinary mixture.\n\n"
        f"{table(headers, rows)}"
    )


def _turns(cases: Iterable[dict[str, Any]]) -> int:
    rows = (row for case in cases for row in case["models"].values())
    return max((len(row.get("seconds", ())) for row in rows), default=0)


def _parameters(result: dict[str, Any], name: str) -> float | None:
    of_dense = result["variants"].get(DENSE, {}).get("parameters")
    return ratio(result["variants"][name].get("parameters"), of_dense)


def _seconds(case: dict[str, Any], name: str) -> float | None:
    return finite(case["models"].get(name, {}).get("median s"))


def _speed(case: dict[str, Any], name: str, other: str) -> float | None:
    """Divide a variant's tokens per second by another's."""
    return ratio(_seconds(case, other), _seconds(case, name))


def _tally(result: dict[str, Any], name: str, other: str) -> str:
    """Count the cases in which a variant is slower, or has no figure."""
    speeds = [_speed(case, name, other) for case in result["cases"] if _seconds(case, other)]
    slower = sum(speed is None or is_below_one(speed) for speed in speeds)
    return f"{slower} of {len(speeds)} ({format_ratio(smallest(speeds))})"


def _cell(case: dict[str, Any], name: str, count: dict[str, Any]) -> str:
    speed = _speed(case, name, DENSE)
    if speed is None:
        note = case["models"].get(name, count).get("note")
        return escaped(note) if note else NONE
    is_lost = name != DENSE and is_above_one(_speed(case, ORDINARY, name))
    return bold(format_ratio(speed), is_lost)


MODELS = Kind(
    title="Whole models, dense and as mixtures",
    legend=LEGEND,
    packages=("tnmoe", "transformers", "torch"),
    fits=lambda result: "models" in first_case(result),
    losses=losses,
    body=body,
)
