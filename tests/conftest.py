"""Settings for the whole suite."""

import atexit
import os
import shutil
import tempfile

# Several processes run the suite side by side, and each would take all cores. The setting comes
# before the import of any array library, and processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis

# The suite runs on shared, noisy machines, so no example has a deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=150)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# No test may use a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# No test may depend on earlier measurements of this machine.
os.environ["TNMOE_CACHE"] = tempfile.mkdtemp(prefix="tnmoe-tests-")
atexit.register(shutil.rmtree, os.environ["TNMOE_CACHE"], ignore_errors=True)
