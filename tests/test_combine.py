"""Sums and products that are rounded as they are formed, against dense algebra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import LIBRARIES, dense_norm, libraries, to_library, to_numpy
from tests.operators import SHAPE, SQUARE, a_mpo, dense, dtypes, random_mpo, scaled, seeds
from tnmoe.chains import zip_up
from tnmoe.options import ADD_METHODS, PRODUCT_METHODS

PADDED = tn.MPOShape((3, 2, 2, 3), (3, 2, 2, 3), 31, 29)


METHODS = {"add": ADD_METHODS, "matmul": PRODUCT_METHODS, "hadamard": PRODUCT_METHODS}


def similar(shape, dtype, library, seed, count=4):
    """Operators that differ little, so that their sum has small bonds."""
    base = random_mpo(shape, dtype, library, seed, 3)
    return [base + 1e-2 * random_mpo(shape, dtype, library, seed + k, 2) for k in range(count)]


@settings(max_examples=40)
@given(dtypes, libraries, seeds, st.sampled_from((0.3, 1e-2, 1e-4)))
@pytest.mark.parametrize("method", ["direct", "successive", "randomized"])
def test_sums_stay_within_the_tolerance(method, dtype, library, seed, rtol):
    mpos = similar(SHAPE, dtype, library, seed)
    total = tn.add(mpos, method=method, rtol=rtol)
    expected = sum(map(dense, mpos))
    assert dense_norm(dense(total) - expected) <= (rtol + 1e-5) * dense_norm(expected)
    assert total.dtype == mpos[0].dtype
    assert all(new <= 20 for new in total.bond_dims)


@settings(max_examples=40)
@given(dtypes, libraries, seeds, st.integers(1, 12))
@pytest.mark.parametrize("method", ["direct", "successive", "randomized"])
def test_sums_with_bounded_bonds_are_near_the_best(method, dtype, library, seed, max_bond):
    mpos = similar(SHAPE, dtype, library, seed)
    expected = sum(map(dense, mpos))
    total = tn.add(mpos, method=method, max_bond=max_bond)
    assert max(total.bond_dims) <= max_bond
    whole = tn.add(mpos)
    _, best = whole.compress(max_bond=max_bond, return_info=True)
    slack = 1e-4 * dense_norm(expected)
    assert dense_norm(dense(total) - expected) <= 3 * best.error_bound + slack


@settings(max_examples=40)
@given(
    dtypes, libraries, seeds, st.sampled_from((0.3, 1e-2, 1e-5)), st.sampled_from((SQUARE, PADDED))
)
@pytest.mark.parametrize("method", ["direct", "randomized"])
def test_products_stay_within_the_tolerance(method, dtype, library, seed, rtol, shape):
    a = random_mpo(SQUARE, dtype, library, seed, 3)
    a = tn.MPO(a.cores, tn.MPOShape(SQUARE.out_dims, SQUARE.in_dims, None, shape.out_features))
    b = random_mpo(shape, dtype, library, seed + 1, 3)
    product = tn.matmul(a, b, method=method, rtol=rtol)
    # The tolerance is that of the whole chain, of which a padded product shows a part.
    whole = dense_norm(dense(tn.MPO((a @ b).cores)))
    assert dense_norm(dense(product) - dense(a) @ dense(b)) <= (rtol + 1e-5) * whole
    assert product.dtype == a.dtype


@settings(max_examples=40)
@given(dtypes, libraries, seeds)
@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
def test_products_with_room_are_exact_and_without_it_near_the_best(method, dtype, library, seed):
    a, b = (random_mpo(SQUARE, dtype, library, seed + k, 3) for k in range(2))
    expected = dense(a) @ dense(b)
    exact = tn.matmul(a, b, method=method, max_bond=9)
    assert dense_norm(dense(exact) - expected) <= 1e-5 * dense_norm(expected)
    small = tn.matmul(a, b, method=method, max_bond=4)
    _, best = exact.compress(max_bond=4, return_info=True)
    assert max(small.bond_dims) <= 4
    assert dense_norm(dense(small) - expected) <= 3 * best.error_bound + 1e-4 * dense_norm(expected)


@settings(max_examples=30)
@given(
    dtypes, libraries, seeds, st.sampled_from((0.3, 1e-2, 1e-5)), st.sampled_from((SHAPE, PADDED))
)
@pytest.mark.parametrize("method", ["direct", "randomized"])
def test_entrywise_products_stay_within_the_tolerance(method, dtype, library, seed, rtol, shape):
    a, b = (random_mpo(shape, dtype, library, seed + k, 3) for k in range(2))
    product = tn.hadamard(a, b, method=method, rtol=rtol)
    whole = dense_norm(dense(tn.MPO(a.hadamard(b).cores)))
    assert dense_norm(dense(product) - dense(a) * dense(b)) <= (rtol + 1e-5) * whole
    assert product.dtype == a.dtype


@settings(max_examples=30)
@given(dtypes, libraries, seeds)
@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
def test_entrywise_products_with_room_are_exact_and_without_it_near_the_best(
    method, dtype, library, seed
):
    a, b = (random_mpo(SHAPE, dtype, library, seed + k, 3) for k in range(2))
    expected = dense(a) * dense(b)
    exact = tn.hadamard(a, b, method=method, max_bond=9)
    assert dense_norm(dense(exact) - expected) <= 1e-5 * dense_norm(expected)
    small = tn.hadamard(a, b, method=method, max_bond=4)
    _, best = exact.compress(max_bond=4, return_info=True)
    assert max(small.bond_dims) <= 4
    assert dense_norm(dense(small) - expected) <= 3 * best.error_bound + 1e-4 * dense_norm(expected)


@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
@pytest.mark.parametrize("max_bond", [4, 16, (4, 4), (100, 4)])
def test_a_limit_that_cuts_nothing_leaves_a_product_exact(max_bond, method):
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))  # no bond of any matrix is larger than 4
    a, b = (random_mpo(shape, "float64", "numpy", seed, 4) for seed in (1, 2))
    expected = dense(a) @ dense(b)
    product = tn.matmul(a, b, method=method, max_bond=max_bond)
    assert dense_norm(dense(product) - expected) <= 1e-12 * dense_norm(expected)


@pytest.fixture
def carried(monkeypatch):
    """Bonds that a zip-up carries on from site to site, under some limit."""
    widths = []

    def seen(*arguments):
        isometry = truncated_isometry(*arguments)
        widths.append(isometry.shape[1])
        return isometry

    truncated_isometry = zip_up.truncated_isometry
    monkeypatch.setattr(zip_up, "truncated_isometry", seen)
    # One term that most tolerances keep alone, and small others.
    a, b = (
        random_mpo(SQUARE, "float64", "numpy", seed, 1)
        + 1e-6 * random_mpo(SQUARE, "float64", "numpy", seed, 9)
        for seed in (1, 2)
    )

    def bonds(**limit):
        widths.clear()
        tn.matmul(a, b, method="zipup", **limit)
        return list(widths)

    return bonds


def test_zip_up_carries_twice_the_bonds_of_the_limit(carried):
    assert carried(max_bond=3) == [6, 6, 6]
    assert carried(bonds=(3, 3, 3)) == [6, 6, 6]


def test_zip_up_carries_what_a_tenth_of_the_tolerance_needs(carried):
    assert carried(rtol=1e-2) == [1, 1, 1]
    assert min(carried(rtol=1e-7)) > 1


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("library", LIBRARIES)
def test_short_chains_work_in_every_scheme(sites, library):
    shape = tn.MPOShape((3,) * sites, (3,) * sites)
    a, b = (random_mpo(shape, "float64", library, seed, 2) for seed in range(2))
    for method in ("direct", "successive", "randomized"):
        total = tn.add([a, b], method=method, max_bond=4)
        np.testing.assert_allclose(dense(total), dense(a) + dense(b), atol=1e-12)
    for method in ("direct", "zipup", "randomized"):
        product = tn.matmul(a, b, method=method, max_bond=4)
        np.testing.assert_allclose(dense(product), dense(a) @ dense(b), atol=1e-12)
        product = tn.hadamard(a, b, method=method, max_bond=4)
        np.testing.assert_allclose(dense(product), dense(a) * dense(b), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tn.add([]), tn.InputError, "at least one operator"),
        (lambda: tn.add([a_mpo(), 1]), TypeError, "expected an MPO, got int"),
        (
            lambda: tn.add([a_mpo(), tn.MPO.zeros(SHAPE)]),
            tn.InputError,
            "a sum needs operators of one",
        ),
        (lambda: tn.add([a_mpo()], method="magic"), tn.InputError, "method must be one of direct"),
        (lambda: tn.add([a_mpo()], method="randomized"), tn.InputError, "needs max_bond, bonds or"),
        (
            lambda: tn.matmul(tn.MPO.zeros(SHAPE), a_mpo()),
            tn.InputError,
            "compose",
        ),
        (
            lambda: tn.hadamard(tn.MPO.zeros(SHAPE), a_mpo()),
            tn.InputError,
            "an entrywise product needs operators of one shape",
        ),
        (lambda: tn.hadamard(a_mpo(), np.eye(36)), TypeError, "expected an MPO, got ndarray"),
        (
            lambda: tn.hadamard(a_mpo(), a_mpo(), method="randomized"),
            tn.InputError,
            "needs max_bond, bonds or",
        ),
        (
            lambda: tn.matmul(a_mpo(), a_mpo(), method="x"),
            tn.InputError,
            "direct, zipup",
        ),
        (
            lambda: tn.add([a_mpo()] * 2, method="randomized", max_bond=1, rng="x"),
            tn.InputError,
            "rng must be a NumPy Generator or an integer of at least 0, got 'x'",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


SCALES = (1e-170, 1e-25, 1e25, 1e150)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["direct", "successive", "randomized"])
def test_sums_of_any_size_stay_within_the_tolerance(method, scale):
    mpos = [tn.MPO.random(tn.MPOShape((2,) * 10, (2,) * 10), 30, rng=k) for k in range(2)]
    zero = tn.MPO.zeros(mpos[0].shape)
    total = tn.add([*(scaled(mpo, scale) for mpo in mpos), zero], method=method, rtol=1e-3)
    expected = mpos[0] + mpos[1]
    back = scaled(total, 1 / scale)
    assert float((back - expected).norm()) <= 1.001e-3 * float(expected.norm())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
def test_products_of_any_size_stay_within_the_tolerance(method, scale):
    a, b = (tn.MPO.random(tn.MPOShape((2,) * 8, (2,) * 8), 6, rng=k) for k in range(2))
    product = tn.matmul(scaled(a, scale), scaled(b, 1e20), method=method, rtol=1e-3)
    error = (scaled(product, 1e-20 / scale) - a @ b).norm()
    assert float(error) <= 1.001e-3 * float((a @ b).norm())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
def test_entrywise_products_of_any_size_stay_within_the_tolerance(method, scale):
    a, b = (tn.MPO.random(tn.MPOShape((2,) * 8, (2,) * 8), 6, rng=k) for k in range(2))
    product = tn.hadamard(scaled(a, scale), scaled(b, 1e20), method=method, rtol=1e-3)
    error = (scaled(product, 1e-20 / scale) - a.hadamard(b)).norm()
    assert float(error) <= 1.001e-3 * float(a.hadamard(b).norm())


@pytest.mark.parametrize("method", ["direct", "successive", "randomized"])
def test_exact_bonds_are_exact_in_every_scheme(method):
    shape = tn.MPOShape((3, 3), (3, 3))
    total = tn.add([tn.MPO.identity(shape)] * 3, method=method, bonds=(2,))
    assert total.bond_dims == (2,)
    np.testing.assert_allclose(total.to_matrix(), 3 * np.eye(9), atol=1e-12)


@pytest.mark.parametrize("limits", [{"max_bond": 3}, {"rtol": 0.05}, {"bonds": (3, 3)}])
@pytest.mark.parametrize(
    ("operation", "method"),
    [(operation, method) for operation, methods in METHODS.items() for method in methods],
)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1.0, 1e100])
def test_the_bound_that_is_reported_holds(operation, method, limits, library, scale):
    """Also for the methods that lose something before the cuts they report."""
    shape = tn.MPOShape((4, 4, 4), (4, 4, 4))
    like = to_library(np.zeros(()), library)
    a, b = (tn.MPO.random(shape, 5, rng=seed, like=like) * scale for seed in (0, 1))
    x, y = (to_numpy(each.to_matrix()) for each in (a, b))
    if operation == "add":
        given, exact = ([a, b, a],), 2 * x + y
    else:
        given, exact = (a, b), x @ y if operation == "matmul" else x * y
    function = getattr(tn, operation)
    mpo, info = function(*given, method=method, **limits, return_info=True)
    size = np.abs(exact).max()  # its square may overflow
    error = size * dense_norm((to_numpy(mpo.to_matrix()) - exact) / size)
    norm = size * dense_norm(exact / size)
    assert error <= info.error_bound + 1e-7 * norm
    # As a bound it is of use: not many times what happened.
    assert info.error_bound <= 5 * error + 1e-7 * norm
    without = function(*given, method=method, **limits)
    assert without.bond_dims == mpo.bond_dims
    np.testing.assert_array_equal(to_numpy(without.to_matrix()), to_numpy(mpo.to_matrix()))


def test_what_is_no_operator_is_refused_in_a_sum_of_one():
    with pytest.raises(TypeError, match="expected an MPO, got ndarray"):
        tn.add([np.eye(4)])
