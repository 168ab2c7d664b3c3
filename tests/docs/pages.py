"""The code of the documentation's pages, and the extras that the pages name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)
NEEDS = re.compile(r"^(?:Needs `)?pip install '?tnmoe(?:\[([\w,]+)\])?'?", re.M)
LINES_AT_THE_TOP = 30

# The first lines of a cell, which say how the site shows it.
OPTIONS = re.compile(r"(?:^:.*\n)*")

PAGES = {
    str(path.relative_to(DOCS).with_suffix("")): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}


def extras(text: str) -> frozenset[str] | None:
    """Return the extras at a page's top; None if the page does not say how to install tnmoe."""
    top = "\n".join(text.splitlines()[:LINES_AT_THE_TOP])
    found = NEEDS.search(top)
    if found is None:
        return None
    return frozenset(filter(None, (found[1] or "").split(",")))


def cells(text: str) -> list[tuple[str, bool]]:
    """Return the cells of a notebook that a reader runs, and whether each should fail."""
    found = []
    for body in CELL.findall(text):
        options = OPTIONS.match(body)[0]
        # The remaining cells belong to the site, not to the reader.
        if "remove-cell" not in options and "remove-input" not in options:
            found.append((body.removeprefix(options), "raises-exception" in options))
    return found


def fences(text: str) -> list[tuple[str, str]]:
    """Return language and code of the plain blocks."""
    return FENCE.findall(text)
