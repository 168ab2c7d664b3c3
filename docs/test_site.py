"""Tests of the built site, page by page as a browser gets it. `make docs` runs them at its end."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag

DOCS = Path(__file__).parent
SITE = DOCS / "_build" / "html"
PAGES = {
    str(path.relative_to(SITE)): path
    for path in sorted(SITE.rglob("*.html"))
    if "_static" not in path.parts
}
REFERENCE = [name for name in PAGES if name.startswith("reference/")]
# Paths of the machine that built the site must not appear in it.
PLACES = {str(DOCS.parent), tempfile.gettempdir(), str(Path.home()), sys.prefix} - {"/"}


@cache
def parsed(name: str) -> BeautifulSoup:
    """Return a page's parsed HTML."""
    return BeautifulSoup(PAGES[name].read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page: str) -> dict[str, Tag]:
    """Return the tags of a page that a link can lead to."""
    return {tag["id"]: tag for tag in parsed(page).find_all(id=True)}


def entries() -> Iterator[tuple[str, str]]:
    """Yield the page and name of every documented object."""
    for page in REFERENCE:
        for term in parsed(page).select("dl.py > dt[id]"):
            yield page, term["id"]


ENTRIES = list(entries())


def entry(page: str, name: str) -> tuple[Tag, Tag]:
    """Return the tags of an object's signature and description."""
    term = anchors(page)[name]
    return term, term.find_next_sibling("dd")


def resolved(name: str) -> object:
    """Return the object of a dotted name."""
    value: object = importlib.import_module("tnmoe")
    path = "tnmoe"
    for attribute in name.split(".")[1:]:
        path += f".{attribute}"
        try:
            value = inspect.getattr_static(value, attribute)
        except AttributeError:
            value = importlib.import_module(path)
    return getattr(value, "__func__", value)


def words(text: str) -> list[str]:
    """Return the words of a text without its markup."""
    text = re.sub(r":\w+:`~(?:[\w]+\.)*(\w+)`", r"\1", text)
    text = re.sub(r":\w+:`([^`]+)`", r"\1", text)
    return re.findall(r"[^\W_]+", text)


def section(text: str, heading: str) -> str:
    """Return a section of a NumPy-style docstring, or nothing."""
    found = re.search(rf"^{heading}\n-+\n(.*?)(?=^[A-Z]\w+\n-+$|\Z)", text, re.M | re.S)
    return found[1] if found else ""


def test_the_site_is_built_and_whole():
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")
               if "_build" not in path.parts}  # fmt: skip
    assert {str(path) for path in sources} <= set(PAGES)
    assert len(ENTRIES) > 200
    assert not any(".tnmoe." in name for _, name in ENTRIES)


@pytest.mark.parametrize(("page", "name"), ENTRIES, ids=[name for _, name in ENTRIES])
def test_a_description_begins_as_its_docstring_does(page, name):
    documented = resolved(name)
    term, body = entry(page, name)
    paragraphs = body.find_all("p", recursive=False)
    if paragraphs and paragraphs[0].get_text().startswith("Bases:"):
        del paragraphs[0]
    if "data" not in term.parent["class"]:
        owner, _, member = name.rpartition(".")
        text = inspect.getdoc(documented) or inspect.getdoc(getattr(resolved(owner), member))
        summary = text.split("\n\n")[0]
        assert words(paragraphs[0].get_text()) == words(summary)
    else:
        assert paragraphs  # written on the page


@pytest.mark.parametrize(("page", "name"), ENTRIES, ids=[name for _, name in ENTRIES])
def test_fields_are_those_of_the_docstring(page, name):
    text = inspect.getdoc(resolved(name)) or ""
    _, body = entry(page, name)
    for fields in body.find_all("dl", class_="field-list", recursive=False):
        for label in fields.find_all("dt", recursive=False):
            heading = label.get_text().strip(" :")
            documented = section(text, heading)
            assert documented, f"{heading} is in no docstring"
            if heading in ("Parameters", "Attributes"):
                listed = re.findall(r"^([\w*][\w*, ]*?)(?: :.*)?$", documented, re.M)
                names = {name.strip("* ") for line in listed for name in line.split(",")}
                cell = label.find_next_sibling("dd")
                shown = {tag.get_text().strip("*") for tag in cell.find_all("strong")}
                assert names <= shown


def defaults(term: Tag) -> list[str]:
    """Return the default values in a signature."""
    return [value.get_text() for value in term.select(".default_value")]


@pytest.mark.parametrize(("page", "name"), ENTRIES, ids=[name for _, name in ENTRIES])
def test_signatures_use_words_that_a_reader_knows(page, name):
    term, _ = entry(page, name)
    text = term.get_text()
    assert not re.search(r"ForwardRef|<\w+ ?>|object at 0x|lambda|typing\.|\bAny, ?\.\.\.", text)
    for default in defaults(term):
        tree = ast.parse(default, mode="eval")
        assert not any(isinstance(node, ast.Name) for node in ast.walk(tree)), default


@pytest.mark.parametrize("page", REFERENCE)
def test_types_lead_to_what_they_name(page):
    links = parsed(page).select("dl.field-list a.reference.internal, dt.sig a.reference.internal")
    for link in links:
        name = link.get_text().removesuffix("()").rpartition(".")[2]
        target = link["href"].partition("#")[2]
        assert target.rpartition(".")[2] == name
        if link.find("em") or link.find_parent("dt"):
            assert inspect.isclass(resolved(target)) or target == "tnmoe.backends.Array"


@pytest.mark.parametrize("page", PAGES)
def test_no_markup_is_left_and_no_anchor_is_missing(page):
    article = parsed(page).select_one("article") or parsed(page)
    assert not article.select(".system-message, .problematic")
    for link in article.select("a[href^='#']"):
        assert link["href"][1:] in {"", *anchors(page)}
    code = {"pre", "code", "math", "script", "style"}
    prose = "".join(
        text for text in article.find_all(string=True)
        if not code & {parent.name for parent in text.parents}
        and not text.find_parent("dt", class_="sig")
    )  # fmt: skip
    left = re.search(r"`|:\w+:`|\*\*(?!\w+ )\S|\]\(|\{\w+\}|^\.\. |\w::\s|\$\$", prose, re.M)
    assert left is None, prose[max(0, left.start() - 60) : left.end() + 60]


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_sharp_present_and_described_in_words(page):
    for image in parsed(page).select("article img"):
        file = (PAGES[page].parent / image["src"]).resolve()
        assert file.is_file()
        assert file.suffix == ".svg"
        assert file.stat().st_size < 300_000
        alt = image.get("alt", "")
        assert len(alt.split()) > 5
        assert file.stem not in alt


@pytest.mark.parametrize("page", PAGES)
def test_a_page_knows_nothing_of_the_machine_that_built_it(page):
    html = PAGES[page].read_text(encoding="utf-8")
    text = parsed(page).get_text() + " ".join(
        str(value) for tag in parsed(page).find_all(True) for value in tag.attrs.values()
    )
    for place in PLACES:
        # Highlighting splits the paths of a listing into tags, so its text counts as well.
        assert place not in html
        assert place not in text
    for image in parsed(page).select("article img"):
        drawing = (PAGES[page].parent / image["src"]).read_text(encoding="utf-8")
        assert not any(place in drawing for place in [*PLACES, "<dc:date>"])


@pytest.mark.parametrize("page", PAGES)
def test_an_expected_error_is_its_last_line(page):
    for output in parsed(page).select(".cell_output .traceback"):
        lines = output.get_text().strip().splitlines()
        assert len(lines) == 1
        assert re.match(r"\w+: ", lines[0])
