"""Cross interpolation, against the matrices that the functions stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    LIBRARIES,
    dense_norm,
    libraries,
    make_matrix,
    rounding,
    shapes,
    to_library,
    to_numpy,
)
from tests.operators import dense, dtypes, random_mpo, seeds
from tnmoe.backends import backend_named

BINARY = tn.MPOShape((2,) * 10, (2,) * 10)
PADDED = tn.MPOShape((4,) * 4, (4,) * 4, 230, 190)


def hilbert(rows, columns):
    return 1.0 / (rows + columns + 1)


def entries_of(matrix, library="numpy"):
    """A matrix as a function."""
    return lambda rows, columns: to_library(matrix[rows, columns], library)


def matrix_of(function, shape):
    rows, columns = np.indices((shape.out_features, shape.in_features)).reshape(2, -1)
    return function(rows, columns).reshape(shape.out_features, shape.in_features)


def relative_error(mpo, expected):
    return dense_norm(dense(mpo) - expected) / dense_norm(expected)


@settings(max_examples=50)
@given(shapes(max_size=1024), dtypes, libraries, seeds, st.integers(1, 3))
def test_an_operator_of_small_bonds_is_found_again(shape, dtype, library, seed, max_bond):
    expected = to_numpy(random_mpo(shape, dtype, "numpy", seed, max_bond).to_matrix())
    mpo, info = tn.cross(entries_of(expected, library), shape, return_info=True)
    assert dense_norm(dense(mpo) - expected) <= 1e-4 * dense_norm(expected)
    like = to_library(expected, library)
    assert (mpo.dtype, type(mpo.cores[0])) == (like.dtype, type(like))
    assert mpo.shape == shape
    assert mpo.center_site == shape.center_site
    assert info.converged
    assert info.estimated_error <= 1e-4


@settings(max_examples=40)
@given(shapes(max_size=1024), st.sampled_from(("gaussian", "zero")), dtypes, seeds)
def test_a_matrix_without_structure_takes_exact_bonds(shape, kind, dtype, seed):
    matrix = make_matrix(kind, shape.out_features, shape.in_features, dtype, seed)
    mpo = tn.cross(entries_of(matrix), shape, rtol=0)
    # Noise of the function is left out, up to 128 units in the last place.
    assert dense_norm(dense(mpo) - matrix) <= 5 * rounding(matrix)


@settings(max_examples=30)
@given(shapes(max_size=1024), dtypes, st.sampled_from((0.0, 1.0, -2.5)))
def test_a_constant_has_bonds_of_one(shape, dtype, value):
    shape = tn.MPOShape(shape.out_dims, shape.in_dims)
    mpo, info = tn.cross(lambda rows, _: np.full(rows.shape, value, dtype), shape, return_info=True)
    np.testing.assert_allclose(dense(mpo), value, rtol=1e-5)
    assert set(mpo.bond_dims) <= {1}
    assert info.converged
    assert info.estimated_error <= 1e-5


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", [tn.MPOShape((2,) * 8, (2,) * 8), PADDED])
def test_smooth_functions_are_within_the_tolerance_with_nearly_the_smallest_bonds(rtol, shape):
    mpo, info = tn.cross(hilbert, shape, rtol=rtol, return_info=True)
    expected = matrix_of(hilbert, shape)
    error = relative_error(mpo, expected)
    assert error <= 2 * rtol
    assert info.converged
    assert rtol / 50 <= info.estimated_error <= rtol
    best = tn.decompose(expected, shape, rtol=rtol).bond_dims
    assert max(mpo.bond_dims) <= max(best) + 2


def test_few_entries_of_a_large_matrix_are_evaluated():
    mpo, info = tn.cross(hilbert, BINARY, return_info=True)
    assert relative_error(mpo, matrix_of(hilbert, BINARY)) <= 2e-6
    assert info.evaluations < 0.05 * 2**20


def test_a_matrix_far_too_large_to_form_is_interpolated():
    """Its entries are those of a product, which no memory could hold."""
    shape = tn.MPOShape((2,) * 60, (2,) * 60)
    mpo, info = tn.cross(
        lambda rows, columns: np.cos(rows / 2.0**58) * np.exp(-columns / 2.0**60),
        shape,
        return_info=True,
    )
    assert info.converged
    assert max(mpo.bond_dims) == 2
    sampled = np.random.default_rng(5).integers(0, 2**60, (2, 20))
    for row, column in sampled.T:
        digits = [
            (int(row) >> (59 - site) & 1, int(column) >> (59 - site) & 1) for site in range(60)
        ]
        entry = np.linalg.multi_dot(
            [core[:, out, in_] for core, (out, in_) in zip(mpo.cores, digits, strict=True)]
        )
        expected = np.cos(row / 2.0**58) * np.exp(-column / 2.0**60)
        assert entry.item() == pytest.approx(expected, abs=1e-5)


def test_the_function_is_called_for_entries_of_the_matrix_alone():
    shape, seen = tn.MPOShape((3, 2, 3), (2, 2, 4), 13, 11), []

    def function(rows, columns):
        assert rows.dtype == columns.dtype == np.int64
        assert rows.shape == columns.shape == (rows.size,)
        seen.append(rows.size)
        assert rows.min() >= 0
        assert columns.min() >= 0
        assert rows.max() < 13
        assert columns.max() < 11
        return 1.0 + rows * columns

    mpo, info = tn.cross(function, shape, return_info=True)
    assert info.evaluations == sum(seen)
    np.testing.assert_allclose(dense(mpo), matrix_of(function, shape), rtol=1e-5)


def test_a_function_may_write_into_what_it_is_given():
    def function(rows, columns):
        rows += 1
        columns += rows
        return 1.0 / columns

    assert relative_error(tn.cross(function, BINARY), matrix_of(hilbert, BINARY)) <= 2e-6


def test_a_seed_gives_one_result():
    cores = [tn.cross(hilbert, BINARY, rng=7).cores for _ in range(2)]
    for first, second in zip(*cores, strict=True):
        np.testing.assert_array_equal(first, second)
    other = tn.cross(hilbert, BINARY, rng=np.random.default_rng(8)).cores
    assert any(not np.array_equal(a, b) for a, b in zip(cores[0], other, strict=True))


@pytest.mark.parametrize("max_bond", [1, 3, (4, 9, 5, 4)])
def test_limited_bonds_are_near_the_best_and_the_result_says_that_it_does_not_fit(max_bond):
    shape = tn.MPOShape((3,) * 5, (3,) * 5)
    mpo, info = tn.cross(hilbert, shape, max_bond=max_bond, return_info=True)
    limits = [max_bond] * 4 if isinstance(max_bond, int) else max_bond
    assert all(map(int.__le__, mpo.bond_dims, limits))
    assert not info.converged
    expected = matrix_of(hilbert, shape)
    best = tn.decompose(expected, shape, max_bond=max_bond)
    assert relative_error(mpo, expected) <= 1.5 * relative_error(best, expected)
    assert info.estimated_error == pytest.approx(relative_error(mpo, expected), rel=0.5)


def test_without_a_tolerance_only_rounding_is_lost():
    mpo, info = tn.cross(hilbert, BINARY, rtol=None, return_info=True)
    assert relative_error(mpo, matrix_of(hilbert, BINARY)) <= 1e-12
    assert info.estimated_error <= 1e-12


@pytest.mark.parametrize("most", [4000, 10_000, 30_000])
def test_no_more_entries_are_evaluated_than_allowed(most):
    noise = np.random.default_rng(0).standard_normal((1024, 1024))
    _, info = tn.cross(entries_of(noise), BINARY, max_evaluations=most, return_info=True)
    assert info.evaluations <= most
    assert not info.converged
    assert info.estimated_error > 0.1


def test_sweeps_keep_to_their_limit():
    _, info = tn.cross(hilbert, BINARY, max_sweeps=1, return_info=True)
    assert info.sweeps == 1
    assert not info.converged


def test_pivots_lead_to_what_no_sample_finds():
    shape, size = tn.MPOShape((2,) * 20, (2,) * 20), 2**20

    def shift(rows, columns):
        return (rows == (columns + 777_777) % size).astype(float)

    missed, info = tn.cross(shift, shape, return_info=True)
    assert float(missed.norm()) < 1
    assert info.converged  # which is no guarantee
    found = tn.cross(shift, shape, pivots=([777_777], [0]))
    assert float(found.norm()) == pytest.approx(2**10)
    one = tn.MPO.identity(shape)
    assert float((tn.matmul(found.T, found, rtol=1e-9) - one).norm()) <= 1e-3


def test_a_peak_is_followed_from_where_the_samples_see_its_flank():
    def peak(rows, columns):
        return np.exp(-(((rows - 37) / 9) ** 2) - ((columns - 800) / 9) ** 2)

    assert relative_error(tn.cross(peak, BINARY), matrix_of(peak, BINARY)) <= 2e-6


@pytest.mark.parametrize("scale", [1e-250, 1e-100, 1e100, 1e250])
def test_the_size_of_the_numbers_does_not_matter(scale):
    mpo, info = tn.cross(lambda r, c: scale * hilbert(r, c), BINARY, return_info=True)
    scaled = tn.MPO(
        [core / scale if k == mpo.center_site else core for k, core in enumerate(mpo.cores)]
    )
    assert info.converged
    assert relative_error(scaled, matrix_of(hilbert, BINARY)) <= 2e-6


@pytest.mark.parametrize("library", LIBRARIES)
def test_half_precision_stays_half(library):
    xp = backend_named(library)
    like = xp.astype(to_library(np.zeros(()), library), "float16")
    mpo = tn.cross(
        lambda rows, columns: xp.astype(to_library(hilbert(rows, columns), library), "float16"),
        tn.MPOShape((4, 4), (4, 4)),
    )
    assert mpo.dtype == like.dtype
    assert relative_error(mpo, matrix_of(hilbert, tn.MPOShape((4, 4), (4, 4)))) <= 0.2


@pytest.mark.parametrize("shape", [tn.MPOShape((6,), (5,), 5), tn.MPOShape((1, 1), (1, 1))])
def test_short_chains_are_exact(shape):
    mpo, info = tn.cross(hilbert, shape, return_info=True)
    assert info.converged
    np.testing.assert_allclose(dense(mpo), matrix_of(hilbert, shape), rtol=1e-12)


def nan_in_column_3(rows, columns):
    return np.where(columns == 3, np.nan, 1.0)


def changing(rows, columns):
    return np.ones(rows.shape, np.float32 if rows.size == 1000 else np.float64)


SMALL = tn.MPOShape((4, 4), (4, 4))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, SMALL), {}, TypeError, "function must be callable, got int"),
        ((hilbert, (4, 4)), {}, TypeError, "shape must be an MPOShape, got tuple"),
        ((hilbert, tn.MPOShape((2**32, 2**32), (1, 1))), {}, tn.InputError, "must fit 64 bits"),
        (
            (nan_in_column_3, SMALL),
            {},
            tn.InputError,
            r"finite numbers, got nan at row \d+, col.* 3$",
        ),
        ((lambda r, c: np.full(r.shape, np.inf), SMALL), {}, tn.InputError, "got inf at row"),
        ((lambda r, c: 1.0, SMALL), {}, tn.InputError, "must return an array: .*float"),
        ((lambda r, c: [1.0], SMALL), {}, tn.InputError, "must return an array: .*list"),
        (
            (lambda r, c: np.ones((r.size, 1)), SMALL),
            {},
            tn.InputError,
            r"of shape \(1000,\), got shape \(1000, 1\)",
        ),
        ((lambda r, c: r + c, SMALL), {}, tn.InputError, "must return float16, .* got dtype int64"),
        ((changing, SMALL), {}, tn.InputError, "numpy's float32 first, then numpy's float64"),
        ((hilbert, SMALL), {"rtol": -1}, tn.InputError, "rtol must be a finite number"),
        ((hilbert, SMALL), {"max_bond": 0}, tn.InputError, "max_bond must be a positive integer"),
        ((hilbert, SMALL), {"samples": 0}, tn.InputError, "samples must be a positive integer"),
        ((hilbert, SMALL), {"max_sweeps": 0}, tn.InputError, "max_sweeps must be a positive"),
        ((hilbert, SMALL), {"rng": "x"}, tn.InputError, "rng must be a NumPy Generator"),
        (
            (hilbert, SMALL),
            {"max_evaluations": 1999},
            tn.InputError,
            "max_evaluations=1999 is too few: two times samples=1000 takes 2000",
        ),
        (
            (hilbert, SMALL),
            {"max_evaluations": 2000},
            tn.InputError,
            "max_evaluations=2000 is too few: the first sweep takes 256 after 2000 before it",
        ),
        (
            (hilbert, SMALL),
            {"pivots": 3},
            tn.InputError,
            r"must be a pair \(rows, columns\), got 3",
        ),
        ((hilbert, SMALL), {"pivots": ([0], [0, 1])}, tn.InputError, "as many integers for rows"),
        ((hilbert, SMALL), {"pivots": ([0.5], [0])}, tn.InputError, "as many integers for rows"),
        (
            (hilbert, SMALL),
            {"pivots": ([16], [0])},
            tn.InputError,
            "rows of pivots must be from 0 to",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        tn.cross(*arguments, **options)
