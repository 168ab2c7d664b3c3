"""The backend of CuPy for the property tests: over CuPy if it has a device, else over a stand-in.

Name this module in ``TNMOE_TEST_BACKEND``, in a process of its own: the stand-in takes the place
of CuPy in the whole process.
"""

from __future__ import annotations

from tests.backends import cupy_stand_in
from tnmoe.backends import backend_named


def has_device() -> bool:
    """Return whether CuPy is installed and finds a device."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # CuPy has an error of its own for every way in which CUDA may be missing
        return False


IS_REAL = has_device()
if not IS_REAL:
    cupy_stand_in.install()
backend = backend_named("cupy")
