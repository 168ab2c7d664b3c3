"""The messages, options and commands that the how-to pages name exist in the code."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

import tnmoe
from tnmoe.cli import _parser

FOLDER = Path(__file__).parents[2] / "docs" / "howto"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in FOLDER.glob("*.md")}

# A message is quoted on a line of its own, in bold.
MESSAGES = re.findall(r"^\*\*`(.+)`\*\*$", PAGES["troubleshooting"], re.MULTILINE)

(COMMANDS,) = (
    action.choices
    for action in _parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)

FENCES = [
    (name, line)
    for name, text in PAGES.items()
    for block in re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
COMMAND_LINES = [(name, line) for name, line in FENCES if line.startswith("tnmoe ")]

# A shorter text of the source, without its inserted values, would match too many messages.
LEAST_LETTERS = 8


def pattern(node: ast.expr) -> str:
    """Return a regular expression for the values of an expression of the source."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(pattern, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return pattern(left) + pattern(right)
    return ".+"


def letters(text: str) -> int:
    """Count the letters of a text, without its inserted values."""
    return len(re.findall("[a-z]", text.replace(".+", "")))


@pytest.fixture(scope="module")
def texts():
    """Return regular expressions for all texts of the package."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in Path(tnmoe.__file__).parent.rglob("*.py")
    ]
    nodes = [each for tree in trees for each in ast.walk(tree) if isinstance(each, ast.expr)]
    return [re.compile(each) for each in set(map(pattern, nodes)) if letters(each) >= LEAST_LETTERS]


def test_quoted_messages_are_those_of_the_source(texts):
    assert len(MESSAGES) > 50
    stale = [each for each in MESSAGES if not any(text.fullmatch(each) for text in texts)]
    assert stale == []


def test_a_message_that_is_not_in_the_source_is_not_found(texts):
    for message in ("LlamaForCausalLM has been eaten by the dog", f"{MESSAGES[1]}, or pray"):
        assert not any(text.fullmatch(message) for text in texts)


def test_messages_are_quoted_once():
    assert sorted(MESSAGES) == sorted(set(MESSAGES))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_with_its_options_and_no_others(name):
    options = {
        option
        for action in COMMANDS[name]._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
    assert set(re.findall(r"`(--[a-z-]+)", PAGES[name])) == options


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_command_lines_are_what_the_command_takes(page, line):
    _, *arguments = shlex.split(line.partition(">")[0], comments=True)
    _parser().parse_args(arguments)


def test_pages_hold_command_lines_of_every_command():
    assert {line.split()[1] for _, line in COMMAND_LINES} == set(COMMANDS)


def test_every_page_is_in_the_table_of_contents():
    assert set(PAGES) - {"index"} <= set(PAGES["index"].split())
