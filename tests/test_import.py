"""What importing costs and needs: real processes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tnmoe.system.extras import EXTRAS


def run(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_numpy_users_never_import_torch():
    code = """
import sys, numpy as np, tnmoe as tn
mpo = tn.decompose(np.eye(4), tn.MPOShape((2, 2), (2, 2)))
mpo.apply(np.ones(4)); mpo.canonicalize(0); mpo.entropy(0)
tn.SharedMPO.replicate(mpo, 2).to_matrices()
print(sorted({"torch", "transformers", "matplotlib", "scipy.linalg"} & set(sys.modules)))
"""
    assert run(code).strip() == "[]"


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_the_core_works_without_any_extra():
    blocked = {"torch", "transformers", "matplotlib", "tqdm", "huggingface_hub"}
    code = """
import numpy as np, tnmoe as tn
print(round(float(tn.decompose(np.eye(4), tn.MPOShape((2, 2), (2, 2))).norm()), 9))
"""
    assert run(BLOCK.format(blocked=blocked) + code).strip() == "2.0"


ALL = {
    "torch", "jax", "cupy", "transformers", "matplotlib", "tensorly", "quimb", "accelerate", "peft",
    "tqdm",
}  # fmt: skip
TORCH = "{} needs torch, which is not installed: pip install 'tnmoe[torch]'"
BOTH = "{} needs torch and transformers, which are not installed: pip install 'tnmoe[hf]'"
PLOT = "tnmoe.plot needs matplotlib, which is not installed: pip install 'tnmoe[plot]'"
NO_TORCH = "{} needs torch, which is not installed: pip install 'tnmoe[hf]'"
NO_TRANSFORMERS = "{} needs transformers, which is not installed: pip install 'tnmoe[hf]'"


@pytest.mark.parametrize(
    ("blocked", "module", "message"),
    [
        (ALL, "tnmoe.nn", TORCH.format("tnmoe.nn")),
        (ALL, "tnmoe.nn.routing.router", TORCH.format("tnmoe.nn")),
        (ALL, "tnmoe.hf", BOTH.format("tnmoe.hf")),
        ({"torch"}, "tnmoe.hf", NO_TORCH.format("tnmoe.hf")),
        ({"transformers"}, "tnmoe.hf", NO_TRANSFORMERS.format("tnmoe.hf")),
        (ALL, "tnmoe.plot", PLOT),
    ],
)
def test_a_missing_extra_is_named_with_all_that_is_missing(blocked, module, message):
    code = f"""
try:
    import {module}
except ImportError as error:
    print(error)
"""
    assert run(BLOCK.format(blocked=blocked) + code).strip() == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("tnmoe.interop.to_quimb(mpo)", "to_quimb needs quimb, which is not installed: "
         "pip install 'tnmoe[interop]'"),
        ("tnmoe.interop.to_tensorly(mpo)", "to_tensorly needs tensorly, which is not installed: "
         "pip install 'tnmoe[interop]'"),
        ("tnmoe.load('x.safetensors', library='torch')", TORCH.format("the torch backend")),
        ("tnmoe.load('x.safetensors', library='jax')", "the jax backend needs jax, which is not "
         "installed: pip install 'tnmoe[jax]'"),
        ("tnmoe.load('x.safetensors', library='cupy')", "the cupy backend needs cupy, which is not "
         "installed: pip install cupy-cuda13x, cupy-cuda12x or another package that fits your CUDA "
         "(https://docs.cupy.dev/en/stable/install.html)"),
    ],
)  # fmt: skip
def test_a_function_names_the_extra_that_it_lacks(call, message, tmp_path):
    code = f"""
import os, tnmoe, tnmoe.interop
os.chdir({str(tmp_path)!r})
mpo = tnmoe.MPO.random(tnmoe.MPOShape((2, 2), (2, 2)), max_bond=2, rng=0)
tnmoe.save("x.safetensors", mpo)
try:
    {call}
except tnmoe.MissingExtraError as error:
    print(error)
"""
    assert run(BLOCK.format(blocked=ALL) + code).strip() == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "."], BOTH.format("tnmoe.hf")),
        (["upcycle", ".", "new"], BOTH.format("tnmoe.hf")),
        (["export", ".", "new"], BOTH.format("tnmoe.hf")),
        (["calibrate"], TORCH.format("tnmoe.nn")),
        (["demo", "--output", "new"], "tnmoe demo needs torch, transformers and matplotlib, "
         "which are not installed: pip install 'tnmoe[demo]'"),
    ],
)  # fmt: skip
def test_commands_name_the_extra_they_lack_in_one_line_and_write_nothing(
    arguments, message, tmp_path
):
    process = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=ALL) + f"""
from tnmoe.cli import main
for help in (["--help"], ["--version"], [{arguments[0]!r}, "--help"]):
    try:
        main(help)
    except SystemExit as done:
        assert done.code == 0
print("status", main({arguments!r}))
"""],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.endswith("status 2\n"), process.stderr
    assert process.stderr == f"tnmoe: {message}\n"
    assert not list(tmp_path.iterdir())


VERSION = """
import importlib.metadata as metadata
true = metadata.version
metadata.version = lambda name: {versions}.get(name) or true(name)
"""


@pytest.mark.parametrize(
    ("blocked", "versions", "message"),
    [
        (set(), {"transformers": "4.57.1"}, "tnmoe.hf needs transformers>=5.0, but 4.57.1 is "
         "installed: pip install 'tnmoe[hf]'"),
        (set(), {"transformers": "4.57.1", "torch": "2.3.1+cpu"}, "tnmoe.hf needs torch>=2.6, but "
         "2.3.1+cpu is installed, and transformers>=5.0, but 4.57.1 is installed: "
         "pip install 'tnmoe[hf]'"),
        ({"torch"}, {"transformers": "4.57.1"}, "tnmoe.hf needs torch, which is not installed, and "
         "transformers>=5.0, but 4.57.1 is installed: pip install 'tnmoe[hf]'"),
        (set(), {"transformers": "5.0.0rc1", "torch": "2.10.0a0"}, "imported"),
    ],
)  # fmt: skip
def test_a_version_that_is_too_old_is_named_with_the_one_that_is_needed(blocked, versions, message):
    code = """
try:
    import tnmoe.hf
    print("imported")
except ImportError as error:
    print(error)
"""
    code = BLOCK.format(blocked=blocked) + VERSION.format(versions=versions) + code
    assert run(code).strip() == message


@pytest.mark.parametrize(
    ("package", "module"),
    [("torch", "tnmoe.nn"), ("transformers", "tnmoe.hf"), ("matplotlib", "tnmoe.plot")],
)
def test_what_is_installed_but_broken_is_not_called_missing(package, module, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('libfoo.so.1 is not there')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import {module}
except ImportError as error:
    print(type(error).__name__, error)
"""
    assert run(code).strip() == "ImportError libfoo.so.1 is not there"


def test_the_versions_that_are_checked_are_those_of_the_package():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def needs(extra):
        found = {}
        for line in extras[extra]:
            if inner := re.fullmatch(r"tnmoe\[(.+)\]", line):
                for each in inner[1].split(","):
                    found |= needs(each)
            else:
                name, _, least = line.partition(">=")
                found[name] = least
        return found

    for extra, packages in EXTRAS.items():
        assert packages.items() <= needs(extra).items()
    for extra in set(extras) - {"test", "docs", "dev", "all"}:
        assert needs(extra).items() <= needs("all").items()
