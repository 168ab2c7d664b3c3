"""The examples in the README run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)

# Later examples of a section go on from its first.
EXAMPLES = {"numpy": "".join(BLOCKS[:2]), "torch": "".join(BLOCKS[2:])}


def test_the_numpy_examples_do_without_torch():
    assert len(BLOCKS) == 5
    assert "torch" not in EXAMPLES["numpy"]


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example_runs_and_prints_what_its_comments_say(code, tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    promises = re.findall(r"print\(.*\)  # (.+) …$", code, re.M)
    assert promises
    assert all(promise in process.stdout for promise in promises)
