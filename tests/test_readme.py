"""The examples in the README run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_there_is_a_numpy_and_a_torch_example():
    assert len(BLOCKS) == 2
    assert "torch" not in BLOCKS[0]


@pytest.mark.parametrize("code", BLOCKS, ids=["numpy", "torch"])
def test_example_runs_and_prints_what_its_comments_say(code, tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    promises = re.findall(r"print\(.*\)  # (.+) …$", code, re.M)
    assert promises
    assert all(promise in process.stdout for promise in promises)
