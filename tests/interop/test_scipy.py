"""SciPy's methods with an operator agree with dense algebra."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import dense_norm, libraries, make_matrix, matrices, rounding, to_library
from tnmoe import interop


@settings(max_examples=60)
@given(matrices, libraries, st.integers(0, 2**32 - 1))
def test_scipy_multiplies_by_the_matrix_and_its_adjoint(case, library, seed):
    shape, matrix = case
    operator = interop.to_scipy(tn.decompose(to_library(matrix, library), shape))
    assert operator.shape == matrix.shape
    assert operator.dtype == matrix.dtype
    rows, columns = (
        make_matrix("gaussian", size, 3, matrix.dtype.name, seed) for size in matrix.shape
    )
    tolerance = rounding(matrix) * max(dense_norm(rows), dense_norm(columns))
    for found, expected in (
        (operator @ columns, matrix @ columns),
        (operator.H @ rows, matrix.conj().T @ rows),
        (operator.T @ rows, matrix.T @ rows),
        (operator.matvec(columns[:, 0]), matrix @ columns[:, 0]),
        (operator.matvec(columns[:, :1]), matrix @ columns[:, :1]),
        (operator.rmatvec(rows[:, 0]), matrix.conj().T @ rows[:, 0]),
    ):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_scipy_finds_singular_values_and_solutions_as_of_the_dense_matrix(dtype):
    shape = tn.MPOShape((4, 3, 4), (4, 3, 3), out_features=45, in_features=34)
    matrix = make_matrix("gaussian", 45, 34, dtype, 0)
    operator = interop.to_scipy(tn.decompose(matrix, shape))
    b = make_matrix("gaussian", 45, 1, dtype, 1)[:, 0]
    rtol = 1e-3 if dtype == "float32" else 1e-8
    values = scipy.sparse.linalg.svds(
        operator, k=4, v0=np.ones(34, dtype), return_singular_vectors=False
    )
    np.testing.assert_allclose(
        np.sort(values)[::-1], np.linalg.svd(matrix, compute_uv=False)[:4], rtol=rtol
    )
    exact = np.linalg.lstsq(matrix, b)[0]
    found = scipy.sparse.linalg.lsqr(operator, b, atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(found, exact, atol=rtol)
    # A definite and well-conditioned operator, composed by SciPy.
    definite = operator.H @ operator + 100 * scipy.sparse.linalg.aslinearoperator(np.eye(34))
    found, missed = scipy.sparse.linalg.cg(definite, exact)
    assert missed == 0
    dense = matrix.conj().T @ matrix + 100 * np.eye(34)
    np.testing.assert_allclose(found, np.linalg.solve(dense, exact), atol=1e-4)


def test_scipy_gets_half_precision_as_single():
    mpo = tn.decompose(torch.eye(4, dtype=torch.bfloat16), tn.MPOShape((2, 2), (2, 2)))
    operator = interop.to_scipy(mpo)
    assert operator.dtype == np.float32
    np.testing.assert_array_equal(operator @ np.eye(4, dtype=np.float32), np.eye(4))


def test_scipy_takes_operators_only():
    with pytest.raises(TypeError, match="expected an MPO, got ndarray"):
        interop.to_scipy(np.eye(3))
