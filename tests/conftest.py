"""Settings for the whole suite."""

import atexit
import os
import shutil
import sys
import tempfile

# Several processes run the suite side by side, and each would take all cores. The setting comes
# before the import of any array library, and processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# The suite runs on shared, noisy machines, so no example has a deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=150)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
# JAX compiles for every new shape.
hypothesis.settings.register_profile("compiled", deadline=None, max_examples=3)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# As in all other libraries, float64 stays what it is. Tests of JAX's default turn it off.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Tests compile more than they compute.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# No test may use a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# No test may depend on earlier measurements of this machine.
os.environ["TNMOE_CACHE"] = tempfile.mkdtemp(prefix="tnmoe-tests-")
atexit.register(shutil.rmtree, os.environ["TNMOE_CACHE"], ignore_errors=True)

# On JAX, the first operation of every shape is compiled. Tests of these files are quick there.
_QUICK_ON_JAX = {"test_backends.py", "test_cholesky.py"}
# The tests that run on JAX before a change lands; all others leave it to ``make test-jax``.
_SLOW_ON_JAX = {"test_decompose.py", "test_mpo.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests of all libraries on JAX, by the time that their file takes there."""
    for item in items:
        library = item.callspec.params.get("library") if hasattr(item, "callspec") else None
        if library == "jax" and item.path.name not in _QUICK_ON_JAX:
            slow = item.path.name in _SLOW_ON_JAX
            item.add_marker(pytest.mark.slow if slow else pytest.mark.jax)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_functions():
    """JAX keeps what it compiled, which takes gigabytes after some thousand shapes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
