"""Tests of single backends, and the names of those that hold for every backend."""

# From the root of a checkout; docs/howto/backend.md recommends them for new backends.
PROPERTY_TESTS = (
    "tests/test_backends.py",
    "tests/test_decompose.py",
    "tests/test_mpo.py",
    "tests/chains/test_rounding.py",
    "tests/chains/test_algebra.py",
    "tests/chains/test_indexing.py",
    "tests/test_combine.py",
    "tests/test_shared_mpo.py",
    "tests/test_io.py",
    "tests/test_cross.py",
    "tests/test_entanglement.py",
)
CUPY_TESTS = ("tests/backends/test_cupy.py", "tests/backends/test_cholesky.py")
