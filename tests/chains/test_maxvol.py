"""Rows of large volume, against all choices of rows."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tnmoe.chains.maxvol import maxvol


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(0, 30), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_rows_interpolate_with_coefficients_of_about_one_at_most(rank, more, is_complex, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rank + more, rank)) + is_complex * 1j
    rows, coefficients = maxvol(matrix)
    assert len(set(rows)) == rank
    np.testing.assert_allclose(coefficients @ matrix[rows], matrix, atol=1e-9)
    assert np.abs(coefficients).max() <= 1.0501
    np.testing.assert_allclose(coefficients[rows], np.eye(rank), atol=1e-9)


def test_no_exchange_of_one_row_makes_the_volume_much_larger():
    matrix = np.random.default_rng(0).standard_normal((9, 3))
    rows, _ = maxvol(matrix)
    volume = abs(np.linalg.det(matrix[rows]))
    for other in combinations(range(9), 3):
        if len(set(other) & set(rows)) == 2:
            assert abs(np.linalg.det(matrix[list(other)])) <= 1.06 * volume
