"""Tests over CuPy, in processes of their own: with a device if there is one, else over a stand-in.

The stand-in is no better than its likeness to CuPy, which a test here checks where CuPy is
installed; it needs no device.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends import CUPY_TESTS, PROPERTY_TESTS
from tests.backends.cupy_stand_in import MODULES, ndarray

ROOT = Path(__file__).parents[2]


def run(*tests: str) -> str:
    """Run tests in a process in which CuPy, or the stand-in, takes the place of the toy."""
    settings = {
        "TNMOE_TEST_BACKEND": "tests.backends.cupy_or_stand_in",
        "HYPOTHESIS_PROFILE": "quick",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_the_backend_passes_its_own_tests():
    assert re.search(r"^\d{3,} passed in ", run(*CUPY_TESTS), re.M)


@pytest.mark.slow
def test_the_backend_passes_the_tests_of_every_backend():
    # Other libraries have their turn where this file runs.
    others = "not numpy and not torch and not jax"
    assert re.search(r"^\d{3,} passed", run("-k", others, *PROPERTY_TESTS), re.M)


def test_the_guide_to_backends_recommends_these_tests():
    guide = (ROOT / "docs/howto/backend.md").read_text(encoding="utf-8")
    recommended = re.findall(r"tests/\S+\.py", guide.partition("## Test it")[2])
    assert tuple(recommended) == PROPERTY_TESTS


# What is written in C does not tell its parameters.
IN_C = ("getDeviceCount", "get_compute_type", "set_compute_type", "isfinite")


@pytest.fixture(scope="module")
def cupy():
    """CuPy itself: only processes that tests start have the stand-in."""
    return pytest.importorskip("cupy")


def test_the_stand_in_has_only_what_cupy_has(cupy):
    for module, contents in MODULES.items():
        try:
            real = importlib.import_module(module)
        except ImportError:  # this part of CuPy needs cuBLAS
            continue
        for name, ours in contents.items():
            found = getattr(real, name)
            if isinstance(ours, int):
                assert found == ours, name
            elif name not in IN_C and not isinstance(ours, type):
                assert_accepts(found, ours)


def assert_accepts(real: Callable, ours: Callable) -> None:
    """Check that a function takes all arguments, with their defaults, that another one takes."""
    offered, taken = inspect.signature(real).parameters, inspect.signature(ours).parameters
    for place, (name, parameter) in enumerate(taken.items()):
        assert (offered[name].kind, offered[name].default) == (parameter.kind, parameter.default)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert [*offered][place] == name, ours


def test_arrays_of_the_stand_in_have_only_what_those_of_cupy_have(cupy):
    for name in set(vars(ndarray)) - {"__slots__", "_device", "_numbers", "_view"}:
        # The first line of the text says: _ndarray_base.get(self, stream=None, order='C', ...)
        first = (getattr(cupy.ndarray, name).__doc__ or "").partition("\n")[0]
        written = re.match(r"_ndarray_base\.[a-z]\w*\(self, ([^*]*)\)", first)
        if written:
            names = re.findall(r"(?:\w+ )?(\w+)(?:=[^,]*)?(?:, |$)", written[1])
            ours = inspect.signature(getattr(ndarray, name)).parameters
            assert [*ours][1:] == names, name
