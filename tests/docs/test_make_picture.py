"""The drawn pictures of the documentation are what their scripts draw."""

import runpy
from pathlib import Path

import matplotlib
import pytest

import tnmoe as tn
from tnmoe import interop

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = ("make_picture", "make_conventions")


@pytest.fixture(params=SCRIPTS)
def script(request):
    return runpy.run_path(str(DOCS / f"{request.param}.py"))


def test_the_committed_picture_is_the_one_that_the_script_draws(script, tmp_path):
    committed = script["TARGET"].read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("another matplotlib draws other bytes")
    script["draw"](tmp_path / script["TARGET"].name)
    assert (tmp_path / script["TARGET"].name).read_text(encoding="utf-8") == committed


def test_the_picture_is_small(script):
    assert script["TARGET"].stat().st_size < 80_000


def test_the_picture_of_conventions_shows_those_of_the_conversions():
    conventions = {
        library: each
        for each in runpy.run_path(str(DOCS / "make_conventions.py"))["CONVENTIONS"]
        for library in each.libraries.split(", ")
    }
    mpo = tn.MPO.random(tn.MPOShape((2, 3, 4), (5, 6, 7)), (8, 9), rng=0)
    quimb = interop.to_quimb(mpo)
    for library, arrays in (
        ("tnmoe", mpo.cores),
        ("tensorly", interop.to_tensorly(mpo)),
        ("quimb", quimb.arrays),
    ):
        shown = conventions[library]
        cores = interop.to_cores(mpo, shown.axes, outermost_bonds=shown.outermost_bonds)
        assert [core.shape for core in cores] == [array.shape for array in arrays]
    legs = [(conventions["quimb"].output_leg, quimb.upper_ind(1))]
    legs += [(conventions["quimb"].input_leg, quimb.lower_ind(1))]
    assert all(shown.format(1) == name for shown, name in legs)
