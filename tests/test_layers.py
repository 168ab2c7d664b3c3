"""Data flow one way: a module imports only what stands above it in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tnmoe"
ROOMS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| room | holds |")[2]
TABLE = re.findall(r"^\| (`.*`) \| .* \|$", ROOMS.partition("\n\n")[0], re.M)
ROWS = {
    name.removesuffix(".py").strip("/"): number
    for number, row in enumerate(TABLE)
    for name in re.findall(r"`([\w./]+)`", row)
}
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"  # gathers what users import
)


def row_of(module: str) -> int:
    """Row of a dotted name: of the module itself, or of the nearest room around it."""
    parts = module.split(".")[1:]
    rooms = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(ROWS[room] for room in rooms if room in ROWS)


def imported(path: Path) -> set[str]:
    """Modules of tnmoe that a file imports anywhere: inside functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.module == "tnmoe":
                found |= {f"tnmoe.{each.name}" for each in node.names if each.name[0] != "_"}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("tnmoe.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_above_it(path):
    own = row_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    below = {name for name in imported(path) if row_of(name) > own}
    assert not below


@pytest.mark.parametrize("room", ROWS)
def test_every_room_of_the_table_exists(room):
    assert (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
