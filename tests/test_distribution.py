"""What is published: built, installed into an empty environment, used there."""

import email
import email.policy
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_readme import EXAMPLES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/tnmoe/tnmoe"
PICTURES = "https://raw.githubusercontent.com/tnmoe/tnmoe/main"
CONSTRAINTS = ROOT / "requirements/constraints.txt"


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    # Nothing of this environment or checkout may be found there.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean,
        check=False,
    )  # fmt: skip


def succeed(*command: object, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel and what it needs, and no more."""
    folder = tmp_path_factory.mktemp("environment")
    succeed(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin/python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    succeed(*pip, "--constraint", CONSTRAINTS, built[1], cwd=folder)
    return python


def test_the_wheel_holds_the_package_its_types_and_its_licence(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tnmoe"}
    assert "tnmoe/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tnmoe").rglob("*.py")}
    assert modules <= set(names)


def test_what_a_package_index_shows_leads_somewhere(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        shown = email.message_from_bytes(wheel.read(name), policy=email.policy.default)
    assert shown["Description-Content-Type"] == "text/markdown"
    text = shown.get_payload()
    links = re.findall(r"\]\(([^)]*)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    assert len(links) > 5
    assert all(link.startswith("https://") for link in links), links
    own = [link for link in links if link.startswith((HOME, PICTURES))]
    files = [re.sub(f"^({HOME}/blob/main|{PICTURES})/|#.*", "", link) for link in own]
    assert files
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert all(picture.startswith(PICTURES) for picture in pictures), pictures
    assert all((ROOT / file).is_file() for file in files), files
    addresses = dict(line.split(", ") for line in shown.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(addresses)
    assert all(address.startswith(HOME) for address in addresses.values())
    versions = [line for line in shown.get_all("Classifier") if "Python :: 3." in line]
    assert f"Programming Language :: Python :: {shown['Requires-Python'].strip('>=')}" in versions


def test_the_source_archive_is_enough_to_test_and_to_document(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("Makefile", "tests/public_api.txt", "requirements/constraints.txt", "docs/conf.py")
    assert set(needed) <= names


def test_nothing_but_the_core_is_needed(installed, tmp_path):
    have = succeed(installed, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    names = {line.partition("==")[0] for line in have.split()} - {"pip", "setuptools"}
    assert names == {"numpy", "opt_einsum", "safetensors", "scipy", "tnmoe"}


def test_the_numpy_examples_of_the_readme_run(installed, tmp_path):
    succeed(installed, "-W", "error", "-c", EXAMPLES["numpy"], cwd=tmp_path)
    assert (tmp_path / "operator.safetensors").exists()


def test_the_command_is_there_and_names_the_extra_it_lacks(installed, tmp_path):
    command = installed.with_name("tnmoe")
    assert "demo" in succeed(command, "--help", cwd=tmp_path)
    refused = run(command, "demo", "--output", tmp_path / "out", cwd=tmp_path)
    assert refused.returncode == 2
    assert "which are not installed: pip install 'tnmoe[demo]'" in refused.stderr
