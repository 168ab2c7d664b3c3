"""What the sections of the report are made of: kinds of results, ratios, tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Kind:
    """What one script measures, and how the page shows it.

    ``fits`` tells its results from others. ``losses`` puts into Markdown where tnmoe is behind in
    one result, ``body`` all the rest. ``packages`` are those whose versions decide the figures.
    """

    title: str
    legend: str
    packages: tuple[str, ...]
    fits: Callable[[Any], bool]
    losses: Callable[[Any], str]
    body: Callable[[Any], str]


def first_case(result: Any) -> dict[str, Any]:
    """The first of the cases that a script measured; empty where there is none."""
    cases = result.get("cases") if isinstance(result, dict) else None
    return cases[0] if isinstance(cases, list) and cases and isinstance(cases[0], dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a result may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value if usable else None


def ratio(value: Any, reference: Any) -> float | None:
    """Of two medians of one run; None unless both are there."""
    value, reference = number(value), number(reference)
    return None if value is None or not reference else value / reference


def least(values: Iterable[Any]) -> float | None:
    return min((value for value in values if number(value) is not None), default=None)


def above(value: float | None, bar: float = 1.0) -> bool:
    """As printed, so that no reader sees a 1.00 that counts as more than 1."""
    return value is not None and round(value, 2) > bar


def below(value: float | None, bar: float = 1.0) -> bool:
    return value is not None and round(value, 2) < bar


def times(value: float | None) -> str:
    """A ratio: two decimals, or two digits where it is small and three where it is large."""
    if value is None:
        return NONE
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def scientific(value: Any) -> str:
    """An error; one that is not a number says so."""
    if number(value) is None:
        return "not finite" if isinstance(value, float) else NONE
    return f"{value:.1e}" if value else "0"


def count(value: Any) -> str:
    return NONE if number(value) is None else f"{value:,}"


def bold(text: str, when: bool = True) -> str:
    return f"**{text}**" if when else text


def plain(value: Any) -> str:
    """Text that Markdown shows as it is: names and error messages hold its signs."""
    text = " ".join(str(value).split())
    for sign in "\\|*_`~[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")


def network(case: dict[str, Any]) -> str:
    """Of a case of experts: what its tables have in common."""
    return f"{plain(case['ffn'])}{', gated' * case['gated']}, {many(case['experts'], 'expert')}"


def tokens(case: dict[str, Any]) -> str:
    return many(case["tokens"], "token")


def many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished cells, numbers to the right."""
    marks = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, marks, *rows))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def folded(summary: str, body: str) -> str:
    """What a reader opens with a click; the summary is text, and in HTML no Markdown."""
    return f"<details><summary>{escape(summary)}</summary>\n\n{body}\n\n</details>"
