"""Pages run where the wheel is installed with the extras that they name, and nothing else is."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docs.pages import NEEDS, PAGES, ROOT, cells, extras, fences
from tests.test_readme import EXAMPLES, README

NOTEBOOKS = {name: cells(text) for name, text in PAGES.items() if cells(text)}
# Their plain blocks are whole programs, and what a shell is told to do with them.
PROGRAMS = {
    "howto/demo": ("code.py", r"tnmoe demo --model.*"),
    "howto/distributed": ("train.py", None),
}
RUNNER = """
import json, re, subprocess, sys

def shell(line):
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\\n")
    # Pages show what bad input gives, too: status 2 and a message.
    assert done.returncode in (0, 2) and "not installed" not in done.stderr, line

names = {"__name__": "__main__", "__shell": shell}
for cell, fails in json.load(sys.stdin):
    # A line that begins with tnmoe is for a shell.
    cell = re.sub(r"^tnmoe .*", lambda line: f"__shell({line[0]!r})", cell, flags=re.M)
    try:
        exec(compile(cell, "cell", "exec"), names)
    except Exception:
        if not fails:
            print(cell, file=sys.stderr)
            raise
"""


def test_every_page_with_code_names_what_it_needs_and_no_extra_that_there_is_not():
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for name in (*NOTEBOOKS, *PROGRAMS):
        needed = extras(PAGES[name])
        assert needed is not None, name
        assert needed <= known, name


def test_sections_of_the_readme_name_what_they_need():
    assert NEEDS.findall(README.read_text(encoding="utf-8")) == ["", "torch", "hf"]


# What gloo's threads say of a process that ends: about one plain torch run in six does so here.
ABORTED = "terminate called without an active exception"


def run_again_if_torch_aborts(*command, **more):
    """Run a command up to four times, if it did its work and failed only at its end."""
    for _ in range(3):
        try:
            return run(*command, **more)
        except AssertionError as error:
            if ABORTED not in str(error):
                raise
    return run(*command, **more)


def run(*command, cwd, **more):
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


def make_environment(folder, wheel, needed, parent=None):
    """A virtual environment, with links to what one with fewer extras has already."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin/python"
    if parent is not None:
        (ours,), (theirs,) = (each.glob("lib/python*/site-packages") for each in (folder, parent))
        run("/bin/cp", "--archive", "--link", "--force", f"{theirs}/.", ours, cwd=folder)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    constraints = ROOT / "requirements/constraints.txt"
    named = f"{wheel}[{','.join(sorted(needed))}]" if needed else wheel
    run(*pip, "--constraint", constraints, named, cwd=folder)
    # The command, which is not among what was linked.
    run(*pip, "--no-deps", "--force-reinstall", wheel, cwd=folder)
    return python


def work(name):
    """What to run for a page: arguments of Python, and its standard input."""
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
    made, failed = {}, {}

    def run_page(name):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        # A page on adding a library speaks of the toy among the tests of a clone.
        (folder / "tests").symlink_to(ROOT / "tests")
        try:
            for arguments, given in work(name):
                run_again_if_torch_aborts(made[needs[name]], *arguments, cwd=folder, input=given)
        except AssertionError as error:
            failed[name] = str(error)

    # What brings more comes later, and has what came before to build on.
    weight = {"plot": 1, "torch": 10, "hf": 20, "demo": 30, "peft": 40}
    with ThreadPoolExecutor(2) as pool:
        for needed in sorted(set(needs.values()), key=lambda each: sum(weight[e] for e in each)):
            brings = {frozenset(): 0, **{each: sum(weight[e] for e in each) for each in made}}
            parents = [each for each in made if is_below(each, needed)]
            parent = max(parents, key=brings.get, default=None)
            made[needed] = make_environment(
                tmp_path / ("-".join(sorted(needed)) or "core"), wheel, needed,
                made[parent].parents[1] if parent is not None else None,
            )  # fmt: skip
            for name in (name for name in needs if needs[name] == needed):
                pool.submit(run_page, name)
    assert not failed, "\n\n".join(f"{name}:\n{text}" for name, text in failed.items())


def is_below(fewer, more):
    """Whether an environment with some extras holds nothing that others do not bring."""
    brings = {"hf": {"hf", "torch"}, "peft": {"peft", "hf", "torch"},
              "demo": {"demo", "hf", "torch", "plot"}}  # fmt: skip
    one, other = (set().union(*(brings.get(e, {e}) for e in each)) for each in (fewer, more))
    return one <= other
