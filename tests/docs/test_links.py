"""Links between documents lead to existing files, headings and pages. Nothing goes online."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments/README.md",
    ROOT / "benchmarks/README.md",
    ROOT / "examples/distributed/README.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts),
]

FENCE = re.compile(r"^(`{3,}|:{3,})([^\n]*)\n(.*?)^\1$", re.M | re.S)
CODE = re.compile(r"(\{\w+\})?`[^`]+`")  # with a name before it, a role
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)")
REFERENCE = re.compile(r"^\[[^\]^][^\]]*\]:\s+(\S+)", re.M)  # footnotes have a ^
ROLE = re.compile(r"\{doc\}`(?:[^`<]*<)?([^`<>]+)>?`")
ONLINE = ("http://", "https://", "mailto:")


def prose(path: Path) -> str:
    """Return the page without its code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def toctrees(path: Path) -> list[str]:
    """Return the pages in the page's tables of contents."""
    fences = FENCE.findall(path.read_text(encoding="utf-8"))
    lines = [line for _, kind, body in fences if kind == "{toctree}" for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub and MyST give the headings, and explicit targets."""
    text = prose(path)
    found: set[str] = set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        copies = [slug, *(f"{slug}-{number}" for number in range(1, len(found) + 2))]
        found.add(next(each for each in copies if each not in found))
    return found


def broken(path: Path) -> list[str]:
    """Return the links of a page that lead nowhere."""
    missing = []
    text = CODE.sub(lambda code: code[0] if code[1] else "", prose(path))
    for link in LINK.findall(text) + REFERENCE.findall(text):
        if link.startswith(ONLINE):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    for page in ROLE.findall(text) + toctrees(path):
        base = DOCS if page.startswith("/") else path.parent
        if not (base / f"{page.strip('/')}.md").is_file():
            missing.append(page)
    return missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path) == []


def test_every_page_of_the_site_is_in_a_table_of_contents():
    listed = {(path.parent / f"{page}.md").resolve() for path in PAGES for page in toctrees(path)}
    site = {path for path in PAGES if DOCS in path.parents and path != DOCS / "index.md"}
    assert site == listed


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One *and* two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-and-two) [c](#here) [d](https://example.org)\n"
        "[e](none.md) [f](other.md#three) {doc}`other` {doc}`g <gone>` `[h](code.md)`\n\n"
        "## Here\n\n```{toctree}\n:maxdepth: 1\n\nother\nabsent\n```\n"
    )
    assert broken(page) == ["none.md", "other.md#three", "gone", "absent"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_tests_that_a_page_names_exist(path):
    named = set(re.findall(r"`(tests/[\w/.]+)`", path.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert named or path.name != "promises.md"
