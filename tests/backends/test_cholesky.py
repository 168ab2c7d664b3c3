"""Every library's Cholesky factor is triangular, has its inverse, and is missing where it must."""

import numpy as np
import pytest

from tests.matrices import DTYPES, LIBRARIES, make_matrix, to_library, to_numpy
from tnmoe.backends import get_backend
from tnmoe.backends.protocol import EPSILON


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cholesky_factor_is_lower_triangular_and_has_its_inverse(library, dtype):
    factor = make_matrix("gaussian", 6, 20, dtype, 0)
    matrix = to_library(factor @ factor.conj().T, library)
    triangle, inverse = map(to_numpy, get_backend(matrix).cholesky(matrix))
    assert triangle.dtype == inverse.dtype == dtype
    tolerance = {"atol": 500 * EPSILON[dtype], "rtol": 100 * EPSILON[dtype]}
    np.testing.assert_allclose(triangle @ triangle.conj().T, to_numpy(matrix), **tolerance)
    np.testing.assert_allclose(triangle @ inverse, np.eye(6), **tolerance)
    np.testing.assert_array_equal(np.triu(triangle, 1), 0)
    np.testing.assert_array_equal(np.triu(inverse, 1), 0)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("values", [(1.0, -1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_matrix_that_is_not_positive_definite_has_no_cholesky_factor(library, values):
    matrix = to_library(np.diag(values), library)
    assert get_backend(matrix).cholesky(matrix) is None
