"""The reference documents all public names and nothing else. This is checked without Sphinx."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from tests.public_api import MODULES

ROOT = Path(__file__).parents[2]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs/reference").glob("*.md"))
}
DIRECTIVE = re.compile(r"^\.\. (?:auto|py:)(class|data|exception|function):: (\S+)$", re.M)
DOCUMENTED = [
    (path, kind, name) for path, text in PAGES.items() for kind, name in DIRECTIVE.findall(text)
]
NAMES = [name for _, _, name in DOCUMENTED]


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", MODULES)
def test_reference_and_all_agree(module):
    documented = [name for name in NAMES if name.rpartition(".")[0] == module]
    assert sorted(documented) == sorted(
        f"{module}.{name}" for name in importlib.import_module(module).__all__
    )


def test_nothing_else_is_documented():
    assert {name.rpartition(".")[0] for name in NAMES} == set(MODULES)
    directives = sum(len(re.findall(r"^\.\. \w*:?\w+::", text, re.M)) for text in PAGES.values())
    modules = sum(text.count(".. currentmodule::") for text in PAGES.values())
    assert directives == len(NAMES) + modules


@pytest.mark.parametrize(("page", "_kind", "name"), DOCUMENTED, ids=NAMES)
def test_object_is_described_and_shown_in_an_example(page, _kind, name):
    documented = resolved(name)
    assert inspect.getdoc(documented)
    cells = re.findall(r"^```\{code-cell\}.*?^```", PAGES[page], re.M | re.S)
    shown = any(re.search(rf"\b{name.rpartition('.')[2]}\b", cell) for cell in cells)
    assert shown or ">>> " in (documented.__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_public_members_are_described(name):
    documented = resolved(name)
    for member, value in vars(documented).items() if inspect.isclass(documented) else ():
        if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
            assert inspect.getdoc(getattr(documented, member)), f"{name}.{member}"


@pytest.mark.parametrize("module", MODULES)
def test_type_checkers_see_all_public_names(module):
    """Type checkers read ``__all__`` as a plain list whose names are bound at top level."""
    source = Path(importlib.import_module(module).__file__)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    bound, public = set(), None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
    assert public
    assert set(public) <= bound
    assert (ROOT / "tnmoe/py.typed").is_file()


def test_the_command_line_page_shows_every_command(capsys):
    from tnmoe.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ {4}(\w+)", capsys.readouterr().out, re.M)
    shown = re.findall(r'^usage\("(\w+)"\)$', PAGES[ROOT / "docs/reference/command-line.md"], re.M)
    assert commands
    assert sorted(shown) == sorted(commands)


CHECKS = {"positive_int", "one_of", "number_in", "integer_from_zero", "index_in", "generator_of"}


def raises(code: object) -> bool:
    """Say whether a function raises an error, or checks an argument, in its own lines."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    calls = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    checks = {call.id for call in calls if isinstance(call, ast.Name)} & CHECKS
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return bool(checks) or any(isinstance(error, ast.Call) for error in raised)


def docstrings(name: str) -> dict[str, list[object]]:
    """Map each docstring of a public name and its members to the functions that it describes."""
    public = resolved(name)
    if inspect.isfunction(public):
        return {inspect.getdoc(public): [public]}
    if not inspect.isclass(public):
        return {}
    own = {
        key: getattr(value, "__func__", value)
        for key, value in vars(public).items()
        if inspect.isfunction(getattr(value, "__func__", value))
    }
    makes = [own[key] for key in ("__init__", "__post_init__") if key in own]
    members = {inspect.getdoc(own[key]): [own[key]] for key in own if not key.startswith("_")}
    return {inspect.getdoc(public): makes} | members


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_the_errors(name):
    for text, functions in docstrings(name).items():
        ours = [function for function in functions if function.__module__.startswith("tnmoe.")]
        # Dataclasses have generated functions, which have no source.
        written = [function for function in ours if "<string>" not in function.__code__.co_filename]
        if any(raises(function) for function in written):
            assert "Error" in text, f"{name}: {ours}"


def documented_names(text: str) -> set[str]:
    """Return the names that a docstring lists as parameters or attributes, or quotes."""
    listed = re.findall(r"^[\w*, ]+(?= : )|^[a-z_*]+(?:, [a-z_*]+)*$", text, re.M)
    quoted = re.findall(r"``([^`]*)``", text)
    return set(re.findall(r"\w+", " ".join([*listed, *quoted])))


def is_foreign(owner: object, member: str) -> bool:
    """Say whether another library's class documents this method."""
    bases = owner.__mro__[1:] if inspect.isclass(owner) else ()
    foreign = [base for base in bases if not base.__module__.startswith("tnmoe")]
    return member != "forward" and any(member in vars(base) for base in foreign)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_documented(name):
    public = resolved(name)
    bases = [base for base in getattr(public, "__mro__", ()) if base.__module__.startswith("tnmoe")]
    for text, functions in docstrings(name).items():
        for function in functions:
            member = function.__name__
            if not function.__module__.startswith("tnmoe") or is_foreign(public, member):
                continue
            above = [inspect.getdoc(vars(base)[member]) for base in bases if member in vars(base)]
            whole = "\n".join(filter(None, [text, inspect.getdoc(public), *above]))
            names = {each for each in inspect.signature(function).parameters if each[0] != "_"}
            assert names - {"self", "cls"} <= documented_names(whole), f"{name}.{member}"
