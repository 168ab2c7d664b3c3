"""Operators that tests of sums, products, fits and squeezing have in common."""

import numpy as np
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import to_library, to_numpy

SHAPE = tn.MPOShape((3, 2, 2, 3), (2, 3, 3, 2))
SQUARE = tn.MPOShape((3, 2, 2, 3), (3, 2, 2, 3))
dtypes = st.sampled_from(("float32", "float64", "complex64", "complex128"))
seeds = st.integers(0, 2**32 - 1)


def random_mpo(shape, dtype, library, seed, max_bond):
    return tn.MPO.random(shape, max_bond, seed, to_library(np.zeros((), dtype), library))


def a_mpo():
    return tn.MPO.random(SQUARE, 2, rng=0)


def dense(mpo):
    return to_numpy(mpo.to_matrix()).astype(complex)


def scaled(mpo, scale):
    """Scale all cores, and not one alone as operators with a centre have it."""
    dtype = mpo.cores[0].dtype
    factor = np.asarray(scale ** (1 / len(mpo.cores)), dtype)
    return tn.MPO([core * factor for core in mpo.cores], mpo.shape)
