"""Pages run in an environment that has the wheel, the extras that they name, and nothing else."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.pages import NEEDS, PAGES, ROOT, cells, extras, fences
from tests.test_readme import EXAMPLES, README

NOTEBOOKS = {name: cells(text) for name, text in PAGES.items() if cells(text)}
# On these pages the plain blocks are whole programs and the shell commands that run them.
PROGRAMS = {
    "howto/demo": ("code.py", r"tnmoe demo --model.*"),
    "howto/distributed": ("train.py", None),
}
# Threads of gloo print this when a process ends. About one plain torch run in six does so.
ABORTED = "terminate called without an active exception"
RUNNER = """
import json, re, subprocess, sys

def shell(line):
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\\n")
    # Pages also show bad input, which ends with status 2 and a message.
    assert done.returncode in (0, 2) and "not installed" not in done.stderr, line

names = {"__name__": "__main__", "__shell": shell}
for cell, fails in json.load(sys.stdin):
    # A line that begins with tnmoe is a shell command.
    cell = re.sub(r"^tnmoe .*", lambda line: f"__shell({line[0]!r})", cell, flags=re.M)
    try:
        exec(compile(cell, "cell", "exec"), names)
    except Exception:
        if not fails:
            print(cell, file=sys.stderr)
            raise
"""


def test_every_page_with_code_names_the_extras_that_it_needs():
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for name in (*NOTEBOOKS, *PROGRAMS):
        needed = extras(PAGES[name])
        assert needed is not None, name
        assert needed <= known, name


def test_sections_of_the_readme_name_what_they_need():
    assert NEEDS.findall(README.read_text(encoding="utf-8")) == ["", "torch", "hf"]


def run_again_if_torch_aborts(*command, **more):
    """Run a command, up to four times if torch aborts it at its end."""
    for _ in range(3):
        try:
            return run(*command, **more)
        except AssertionError as error:
            if ABORTED not in str(error):
                raise
    return run(*command, **more)


def run(*command, cwd, **more):
    """Run a command with the installed wheel, and check that it succeeds."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {
        "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "TNMOE_CACHE": str(cwd), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean,
        check=False, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def distributions(requirement, found=None):
    """Return what pip installs for a requirement, itself included: distributions by name."""
    found = {} if found is None else found
    for extra in requirement.extras or {""}:
        key = canonicalize_name(requirement.name), extra
        if key in found:
            continue
        found[key] = installed = metadata.distribution(requirement.name)
        for line in installed.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                distributions(needed, found)
    return {name: installed for (name, _), installed in found.items()}


def make_environment(folder, wheel, needed):
    """Make a virtual environment that links to packages of this one: they need no unpacking."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    brought = distributions(Requirement(f"tnmoe[{','.join(needed)}]"))
    brought.pop("tnmoe")
    owners = metadata.packages_distributions()
    for installed in brought.values():
        for name in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            # Otherwise, the link would bring more than the page names.
            assert len(set(owners.get(name.removesuffix(".py"), [""]))) == 1, name
            (packages / name).symlink_to(installed.locate_file(name))
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "install", "--no-deps")
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    return python


def work(name):
    """Return the runs that a page needs: arguments of Python and its standard input."""
    if name in EXAMPLES:
        return [(("-W", "error", "-c", EXAMPLES[name]), None)]
    if name not in PROGRAMS:
        return [(("-c", RUNNER), json.dumps(NOTEBOOKS[name]))]
    file, shell = PROGRAMS[name]
    first, *_ = (code for language, code in fences(PAGES[name]) if language == "python")
    write = f"open({file!r}, 'w').write({first!r})"
    if shell is None:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file)
        return [(("-c", write), None), (launch, None)]
    lines = [line for line in PAGES[name].splitlines() if re.fullmatch(shell, line)]
    return [(("-c", RUNNER), json.dumps([[first, False], *((line, False) for line in lines)]))]


@pytest.mark.slow
def test_pages_run_with_what_they_name(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    needs = {name: extras(PAGES[name]) for name in (*NOTEBOOKS, *PROGRAMS)}
    needs |= {"numpy": frozenset(), "torch": frozenset({"torch"}), "hf": frozenset({"hf"})}
    failed = {}

    def run_page(name, python):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        # The page about array libraries uses the toy among the tests of a clone.
        (folder / "tests").symlink_to(ROOT / "tests")
        try:
            for arguments, given in work(name):
                run_again_if_torch_aborts(python, *arguments, cwd=folder, input=given)
        except AssertionError as error:
            failed[name] = str(error)

    with ThreadPoolExecutor(2) as pool:
        for needed in dict.fromkeys(needs.values()):
            folder = tmp_path / ("-".join(sorted(needed)) or "core")
            python = make_environment(folder, wheel, needed)
            for name in (name for name in needs if needs[name] == needed):
                pool.submit(run_page, name, python)
    assert not failed, "\n\n".join(f"{name}:\n{text}" for name, text in failed.items())
