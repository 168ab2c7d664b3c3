"""What importing costs and needs: real processes."""

import subprocess
import sys

import pytest


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


@pytest.mark.parametrize(
    ("blocked", "module", "message"),
    [
        (
            "torch",
            "tnmoe.nn",
            "tnmoe.nn needs torch, which is not installed: pip install 'tnmoe[torch]'",
        ),
        (
            "torch",
            "tnmoe.hf",
            "tnmoe.nn needs torch, which is not installed: pip install 'tnmoe[torch]'",
        ),
        (
            "transformers",
            "tnmoe.hf",
            "tnmoe.hf needs transformers, which is not installed: pip install 'tnmoe[hf]'",
        ),
        (
            "matplotlib",
            "tnmoe.plot",
            "tnmoe.plot needs matplotlib, which is not installed: pip install 'tnmoe[plot]'",
        ),
    ],
)
def test_a_missing_extra_is_named(blocked, module, message):
    code = f"""
try:
    import {module}
except ImportError as error:
    print(error)
"""
    assert run(BLOCK.format(blocked={blocked}) + code).strip() == message


@pytest.mark.parametrize("blocked", ["torch", "transformers", "matplotlib"])
def test_the_demo_names_a_missing_extra_and_exits_with_2(blocked, tmp_path):
    code = f"""
from tnmoe.cli import main
print(main(["demo", "--output", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked={blocked}) + code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "2"
    assert f"tnmoe demo needs {blocked}, which is not installed" in process.stderr
    assert "pip install 'tnmoe[demo]'" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())
