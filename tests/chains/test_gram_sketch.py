"""What the sketch of a Gram matrix promises about truncations that are made with it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.matrices import KINDS, LIBRARIES, make_matrix, to_library, to_numpy
from tnmoe.backends import backend_named
from tnmoe.chains.gram_sketch import GramSketch


def sketch_of(matrix, library, size, blocks, seed=0):
    """Sketch a matrix from blocks of its rows, with random orthonormal vectors."""
    xp = backend_named(library)
    probes = np.random.default_rng(seed).standard_normal((matrix.shape[1], size))
    sketch = GramSketch(xp, to_library(np.linalg.qr(probes.astype(matrix.dtype))[0], library))
    for block in np.array_split(matrix, blocks):
        sketch.add(to_library(block, library), "rows")
    factor, missing = sketch.factor()
    return to_numpy(factor), missing, sketch


@given(
    st.sampled_from(KINDS),
    st.sampled_from(("float64", "complex128")),
    st.sampled_from(LIBRARIES),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_the_approximation_is_never_larger_than_the_gram_matrix(
    kind, dtype, library, size, blocks, seed
):
    matrix = make_matrix(kind, 30, 12, dtype, seed)
    factor, missing, sketch = sketch_of(matrix, library, size, blocks, seed)
    scaled = matrix / 2.0**sketch.exponent
    gram, approximation = (each.conj().T @ each for each in (scaled, factor))
    rounding = 1e-12 * np.trace(gram).real
    assert np.linalg.eigvalsh(gram - approximation).min() >= -rounding
    assert missing == pytest.approx(np.trace(gram - approximation).real, abs=rounding)
    if size == 12:
        assert missing <= rounding


@given(st.integers(1, 11), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_truncation_of_the_sketch_bounds_that_of_the_matrix(size, rank, seed):
    matrix = make_matrix("gaussian", 30, 12, "float64", seed) * 0.5 ** np.arange(12)
    factor, missing, _ = sketch_of(matrix, "numpy", size, 3, seed)
    right = np.linalg.svd(factor, full_matrices=False)[2][:rank]

    def lost(array):
        return np.linalg.norm(array - array @ right.T @ right) ** 2

    assert lost(matrix) <= missing + lost(factor) + 1e-12 * np.linalg.norm(matrix) ** 2


def test_as_many_vectors_as_the_rank_miss_nothing():
    matrix = make_matrix("gaussian", 30, 3, "float64", 0) @ make_matrix(
        "gaussian", 3, 12, "float64", 1
    )
    factor, missing, _ = sketch_of(matrix, "numpy", 5, 4)
    np.testing.assert_allclose(factor.T @ factor, matrix.T @ matrix, atol=1e-9)
    assert missing <= 1e-9
