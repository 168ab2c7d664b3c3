"""Parts of the report's sections: kinds of results, ratios, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

# Stands where there is no figure.
NONE = "–"


@dataclass(frozen=True)
class Kind:
    """A kind of measurement, and the way in which the page shows it.

    ``fits`` recognises its results. ``losses`` writes in Markdown where tnmoe is behind in one
    result, and ``body`` writes all the rest. The versions of ``packages`` determine the figures.
    """

    title: str
    legend: str
    packages: tuple[str, ...]
    fits: Callable[[Any], bool]
    losses: Callable[[Any], str]
    body: Callable[[Any], str]


def first_case(result: Any) -> dict[str, Any]:
    """Return the first case that a script measured, or an empty one if there is none."""
    cases = result.get("cases") if isinstance(result, dict) else None
    return cases[0] if isinstance(cases, list) and cases and isinstance(cases[0], dict) else {}


def finite(value: Any) -> float | None:
    """Return a finite number, or None for anything else that a result may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value if usable else None


def ratio(value: Any, reference: Any) -> float | None:
    """Divide two medians of one run; return None unless both exist."""
    value, reference = finite(value), finite(reference)
    return None if value is None or not reference else value / reference


def smallest(values: Iterable[Any]) -> float | None:
    """Return the smallest finite number; None if there is none."""
    return min((value for value in values if finite(value) is not None), default=None)


def is_above_one(value: float | None) -> bool:
    """Compare the rounded ratio, so that a printed 1.00 never counts as more than 1."""
    return value is not None and round(value, 2) > 1


def is_below_one(value: float | None) -> bool:
    """Compare the rounded ratio, so that a printed 1.00 never counts as less than 1."""
    return value is not None and round(value, 2) < 1


def format_ratio(value: float | None) -> str:
    """Write a ratio with two decimals; a small one with two digits, a large one with three."""
    if value is None:
        return NONE
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def format_error(value: Any) -> str:
    """Write an error with two digits; say so where it is not finite."""
    if finite(value) is None:
        return "not finite" if isinstance(value, float) else NONE
    return f"{value:.1e}" if value else "0"


def format_count(value: Any) -> str:
    """Write a whole number with thousands separators."""
    return NONE if finite(value) is None else f"{value:,}"


def bold(text: str, when: bool = True) -> str:
    """Make a text bold, if it should be."""
    return f"**{text}**" if when else text


def escaped(value: Any) -> str:
    """Escape the signs of Markdown, which names and error messages contain."""
    text = " ".join(str(value).split())
    for sign in "\\|*_`~[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")


def network(case: dict[str, Any]) -> str:
    """Name the network, the number of experts and those per token, if more than one."""
    top_k = case.get("top_k", 1)
    return (
        f"{escaped(case['ffn'])}{', gated' * case['gated']}, {counted(case['experts'], 'expert')}"
        f"{f', top-{top_k}' * (top_k != 1)}"
    )


def tokens(case: dict[str, Any]) -> str:
    """Name the number of tokens of a case."""
    return counted(case["tokens"], "token")


def counted(number: int, noun: str) -> str:
    """Write a number with its noun in the singular or plural."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out finished cells as a table, with all columns but the first to the right."""
    marks = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, marks, *rows))


def bullets(lines: Iterable[str]) -> str:
    """Write lines as a list."""
    return "\n".join(f"- {line}" for line in lines)


def collapsible(summary: str, body: str) -> str:
    """Hide Markdown below a summary that opens with a click; the summary is plain text."""
    return f"<details><summary>{escape(summary)}</summary>\n\n{body}\n\n</details>"
