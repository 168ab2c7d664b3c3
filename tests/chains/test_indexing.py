"""Entries, rows and columns, against the same index of the dense matrix in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import LIBRARIES, libraries, matrices, rounding, to_library, to_numpy

PADDED = tn.MPOShape((2, 3, 2), (3, 2, 2), out_features=11, in_features=10)
MATRIX = np.random.default_rng(0).standard_normal((11, 10))
# The matrix of all tests of errors.
SMALL = tn.decompose(MATRIX, PADDED)
# A matrix with 2⁹⁰ rows and columns.
HUGE = tn.MPO.identity(tn.MPOShape((2,) * 90, (2,) * 90))


def numbers_of(size):
    return st.integers(-size, size - 1)


def indices(size):
    """Every kind of index along an axis."""
    return st.one_of(
        numbers_of(size),
        st.slices(size),
        st.lists(numbers_of(size), max_size=4),
        st.lists(st.booleans(), min_size=size, max_size=size).map(lambda mask: np.array(mask)),
    )


@settings(max_examples=100)
@given(matrices, libraries, st.data())
def test_a_part_is_that_of_the_dense_matrix(case, library, data):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape)
    rows, columns = (data.draw(indices(size)) for size in matrix.shape)
    both_listed = not any(isinstance(each, int | slice) for each in (rows, columns))
    index = np.ix_(rows, columns) if both_listed else (rows, columns)
    if both_listed:  # an empty list has no dtype that NumPy takes
        index = tuple(each.astype(int) for each in index)
    part = mpo[index]
    assert tuple(part.shape) == matrix[index].shape
    assert part.dtype == mpo.dtype
    np.testing.assert_allclose(to_numpy(part), matrix[index], atol=rounding(matrix))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        (),
        (4, -2),
        slice(2, 5),
        slice(None, None, -2),
        (slice(None), 4),
        (slice(None, None, 2), [1, 4]),
        [3, 3, -1],
        (np.int64(3), np.array(4)),
        ([0, 1, 2], [5, 5, -1]),
        ([[0], [1]], [[2, 3, 4]]),
        ([[0, 1], [2, 3]], slice(1, 9)),
        (3, [1, 2]),
        np.arange(11) % 3 == 0,
        ([True] * 11, 2),
        (list(range(11)) * 20, list(range(10)) * 22),
        (slice(5, 5), [0, 1]),
        ([], []),
    ],
    ids=str,
)
def test_an_index_means_what_it_means_in_numpy(library, index):
    mpo = tn.decompose(to_library(MATRIX, library), PADDED)
    part = mpo[index]
    assert tuple(part.shape) == MATRIX[index].shape
    np.testing.assert_allclose(to_numpy(part), MATRIX[index], atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_indices_may_be_arrays_of_the_library(library):
    mpo = tn.decompose(to_library(MATRIX, library), PADDED)
    rows, row = (to_library(np.array(each), library) for each in ([2, -1], 3))
    np.testing.assert_allclose(to_numpy(mpo[rows]), MATRIX[[2, -1]], atol=1e-12)
    np.testing.assert_allclose(to_numpy(mpo[row, rows]), MATRIX[3, [2, -1]], atol=1e-12)


def test_an_entry_is_a_scalar_of_the_library():
    assert isinstance(SMALL[1, 2], np.float64)
    tensor = tn.decompose(torch.from_numpy(MATRIX), PADDED)[1, 2]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == ()


def test_parts_of_a_matrix_that_no_memory_holds():
    row = 2**80 + 5
    assert HUGE[row, row] == 1
    assert HUGE[row, row - 1] == 0
    assert HUGE[-1, 2**90 - 1] == 1
    np.testing.assert_array_equal(HUGE[[row, 0], [row, 1]], [1, 0])
    np.testing.assert_array_equal(HUGE[row : row + 3, [row + 1, row + 2]], np.eye(3)[:, 1:])
    narrow = tn.MPO.random(tn.MPOShape((2,) * 40, (2,) * 4 + (1,) * 36), 3, rng=0)
    x = np.random.default_rng(0).standard_normal(16)
    # The same rows by another way: applied to a vector, then cut down to them site by site.
    last = tn.MPO([core[:, -1:] for core in narrow.cores])
    np.testing.assert_allclose(narrow[-1] @ x, last.apply(x)[0], rtol=1e-10)


def test_half_precision_is_computed_in_single():
    matrix = torch.from_numpy(MATRIX).bfloat16()
    part = tn.decompose(matrix, PADDED)[2:4]
    assert part.dtype == torch.bfloat16
    torch.testing.assert_close(part, matrix[2:4], rtol=0.05, atol=0.05)


def test_gradients_reach_the_cores_through_every_way():
    cores = [torch.from_numpy(core).clone().requires_grad_() for core in SMALL.cores]

    def parts(*cores):
        mpo = tn.MPO(cores, PADDED)
        return mpo[3, 4], mpo[2], mpo[:, 1], mpo[1:], mpo[[0, 5], [1, 1]]

    assert torch.autograd.gradcheck(parts, cores)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (11, "row 11 is out of range: the operator has 11 rows"),
        (-12, "row -12 is out of range"),
        ((0, 10), "column 10 is out of range: the operator has 10 columns"),
        (([0, 11], 0), "row 11 is out of range"),
        ((0, 0, 0), "takes two indices at most: got 3"),
        (..., "rows are chosen by an integer, a slice, integers or a mask, got Ellipsis"),
        ((0, None), "columns are chosen by .*, got None"),
        (1.0, "got 1.0"),
        ([0.5], r"got \[0.5\]"),
        ("row", "got 'row'"),
        ([[1], [2, 3]], r"got \[\[1\], \[2, 3\]\]"),
        (True, r"a mask of rows needs shape \(11,\), got \(\)"),
        (MATRIX > 0, r"a mask of rows needs shape \(11,\), got \(11, 10\)"),
        (([0, 1], [0, 1, 2]), r"must broadcast: got \(2,\) rows and \(3,\) columns.*np.ix_"),
    ],
    ids=lambda value: "a 2-d mask" if isinstance(value, np.ndarray) else None,
)
def test_an_index_that_does_not_fit_is_named(index, message):
    with pytest.raises(IndexError, match=message) as caught:
        SMALL[index]
    assert isinstance(caught.value, tn.InputError)


def test_an_operator_is_no_sequence_of_rows():
    """A loop over rows would be slow without a word, and mistake an operator for a list of them."""
    with pytest.raises(TypeError, match="not iterable"):
        iter(SMALL)
    with pytest.raises(TypeError, match="not iterable"):
        tn.add(SMALL, max_bond=2)
    np.testing.assert_allclose(np.asarray(SMALL), MATRIX, atol=1e-12)
