"""Settings for the whole suite."""

import atexit
import os
import shutil
import tempfile

# Several processes run the suite side by side; each would otherwise take all cores. Set before
# anything imports an array library, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis

# Machines that run the suite are shared and noisy: an example is never judged by its time.
hypothesis.settings.register_profile("default", deadline=None, max_examples=150)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Nothing in the suite may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Nor may it depend on what was measured on this machine before.
os.environ["TNMOE_CACHE"] = tempfile.mkdtemp(prefix="tnmoe-tests-")
atexit.register(shutil.rmtree, os.environ["TNMOE_CACHE"], ignore_errors=True)
