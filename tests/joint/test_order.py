"""Orders of rows, columns and legs of one matrix, against dense algebra and hidden orders."""

from itertools import pairwise

import numpy as np
import pytest

import tnmoe as tn
from tests.matrices import LIBRARIES, to_library, to_numpy

SHAPE = tn.MPOShape((4, 6), (3, 4))


def gaussian(*size, seed=0):
    return np.random.default_rng(seed).standard_normal(size)


def with_blocks(seed=0):
    """A product over the sites whose rows and columns stand in random orders."""
    rng = np.random.default_rng(seed)
    matrix = np.kron(2.0 ** np.arange(0, 24, 6)[:, None] * np.ones(3), gaussian(6, 4, seed=1))
    return matrix[rng.permutation(24)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_the_error_is_that_of_the_ordered_matrix_and_falls(dtype, library):
    matrix = (gaussian(24, 12) * np.exp(gaussian(24, 1, seed=1))).astype(dtype)
    found = tn.decompose_ordered(
        to_library(matrix, library), SHAPE, max_bond=3, order_columns=True, tol=0
    )
    assert type(found.mpo.cores[0]) is type(to_library(matrix, library))
    ordered = matrix[found.rows][:, found.columns]
    error = np.linalg.norm(ordered - to_numpy(found.mpo.to_matrix())) / np.linalg.norm(matrix)
    assert np.isclose(found.errors[-1], error, rtol=1e-4)
    plain = tn.decompose(matrix, SHAPE, max_bond=3).to_matrix()
    given = np.linalg.norm(matrix - plain) / np.linalg.norm(matrix)
    assert np.isclose(found.errors[0], given, rtol=1e-4)
    for before, after in pairwise(found.errors):
        assert after < before
    assert found.gain > 0.03
    for order, size in ((found.rows, 24), (found.columns, 12)):
        assert sorted(order) == list(range(size))


def test_blocks_of_large_and_small_rows_are_found():
    found = tn.decompose_ordered(with_blocks(), SHAPE, max_bond=1)
    assert found.errors[0] > 0.2
    assert found.errors[-1] < 0.5 * found.errors[0]


@pytest.mark.parametrize("movable", [(False, False), (True, False), (False, True)])
def test_only_what_may_move_moves(movable):
    matrix = gaussian(24, 12) * np.exp(gaussian(24, 1, seed=1)) * np.exp(gaussian(1, 12, seed=2))
    found = tn.decompose_ordered(
        matrix, SHAPE, max_bond=2, order_rows=movable[0], order_columns=movable[1], tol=0
    )
    for order, moves in zip((found.rows, found.columns), movable, strict=True):
        assert (order != np.arange(len(order))).any() == moves
    assert (found.gain > 0) == any(movable)


@pytest.mark.parametrize("matrix", [np.zeros((24, 12)), np.ones((24, 12)), gaussian(24, 12)])
def test_the_given_order_stays_where_no_other_gains(matrix):
    found = tn.decompose_ordered(matrix, SHAPE, order_columns=True, arrange_legs=True)
    assert (found.rows == np.arange(24)).all()
    assert (found.columns == np.arange(12)).all()
    assert found.mpo.shape == SHAPE
    assert (found.gain, len(found.errors)) == (0.0, 1)


def test_legs_are_arranged_within_the_parameters():
    # A product over sites that the given arrangement does not have.
    matrix = np.kron(gaussian(6, 3), gaussian(4, 4, seed=1)) + 1e-3 * gaussian(24, 12, seed=2)
    given = {"max_bond": 1, "order_rows": False}
    shape = tn.MPOShape((4, 6), (4, 3))
    found = tn.decompose_ordered(matrix, shape, arrange_legs=True, **given)
    assert found.mpo.shape == tn.MPOShape((6, 4), (3, 4))
    assert found.errors[-1] < 1e-2 < found.errors[0]
    assert found.mpo.num_params <= shape.num_params(1)


def test_the_number_of_parameters_is_kept():
    found = tn.decompose_ordered(gaussian(24, 12), SHAPE, max_params=150, arrange_legs=True)
    assert found.mpo.num_params <= 150


def test_bad_input_is_named():
    matrix = gaussian(24, 12)
    for arguments, message in (
        ({"order_rows": 2}, "order_rows must be one of"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"tol": 1}, "tol must be in"),
        ({"max_bond": 0}, "max_bond"),
        ({"arrange_legs": "yes"}, "arrange_legs"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.decompose_ordered(matrix, SHAPE, **arguments)
    shape = tn.MPOShape((1, 2, 3, 4), (1, 2, 3, 2))
    with pytest.raises(tn.InputError, match=r"up to 64 arrangements of the legs, .* has 288: give"):
        tn.decompose_ordered(matrix, shape, arrange_legs=True)
