"""Code of the documentation's pages, and the extras that they say they need."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)
NEEDS = re.compile(r"^(?:Needs `)?pip install '?tnmoe(?:\[([\w,]+)\])?'?", re.M)
LINES_AT_THE_TOP = 30

# Of a cell, the lines that tell the site how to show it.
OPTIONS = re.compile(r"(?:^:.*\n)*")

PAGES = {
    str(path.relative_to(DOCS).with_suffix("")): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}


def extras(text: str) -> frozenset[str] | None:
    """Those that a page names at its top; None if it names no way to install tnmoe."""
    top = "\n".join(text.splitlines()[:LINES_AT_THE_TOP])
    found = NEEDS.search(top)
    if found is None:
        return None
    return frozenset(filter(None, (found[1] or "").split(",")))


def cells(text: str) -> list[tuple[str, bool]]:
    """What a reader runs of a notebook, and whether it is meant to fail."""
    found = []
    for body in CELL.findall(text):
        options = OPTIONS.match(body)[0]
        # Other cells belong to the site, not to the reader.
        if "remove-cell" not in options and "remove-input" not in options:
            found.append((body.removeprefix(options), "raises-exception" in options))
    return found


def fences(text: str) -> list[tuple[str, str]]:
    """Language and code of plain blocks."""
    return FENCE.findall(text)
