"""The picture in README is what its script draws."""

import runpy
from pathlib import Path

import matplotlib
import pytest

SCRIPT = Path(__file__).parents[2] / "docs/make_picture.py"


def test_the_committed_picture_is_the_one_that_the_script_draws(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    committed = script["TARGET"].read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("another matplotlib draws other bytes")
    script["draw"](tmp_path / script["TARGET"].name)
    assert (tmp_path / script["TARGET"].name).read_text(encoding="utf-8") == committed


def test_the_picture_is_small():
    assert runpy.run_path(str(SCRIPT))["TARGET"].stat().st_size < 60_000
