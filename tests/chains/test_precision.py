"""float16 and bfloat16: computed in float32, returned in what was given, to its own precision."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import KINDS, dense_norm, make_matrix, shapes

HALVES = (("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16"))
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
# What is badly scaled here overflows there; a moderate scale of its own takes its place.
kinds = st.sampled_from([kind for kind in KINDS if kind != "badly scaled"])


def to_half(matrix, library, dtype):
    if library == "numpy":
        return matrix.astype(dtype)
    return torch.from_numpy(matrix).to(getattr(torch, dtype))


def widened(array):
    if isinstance(array, torch.Tensor):
        return array.double().numpy()
    return array.astype("float64")


def chain(mpo):
    """The whole chain as a matrix in double precision, padding included."""
    wide = tn.MPO([widened(core) for core in mpo.cores])
    return wide.to_matrix()


def padded_to(matrix, chain):
    pads = [(0, n - m) for n, m in zip(chain.shape, matrix.shape, strict=True)]
    return np.pad(matrix, pads)


halves = st.builds(
    lambda shape, kind, half, scale, seed: (
        shape,
        to_half(
            scale * make_matrix(kind, shape.out_features, shape.in_features, "float32", seed),
            *half,
        ),
        EPSILON[half[1]],
    ),
    shapes(max_sites=5, max_size=1024),
    kinds,
    st.sampled_from(HALVES),
    st.sampled_from((0.1, 1.0, 10.0)),
    st.integers(0, 2**32 - 1),
)
methods = st.sampled_from(("auto", "svd", "eigh", "randomized"))


@given(halves, methods, st.integers(1, 12), st.sampled_from((None, 0.1, 0.5)))
def test_a_truncation_obeys_its_bound_up_to_the_rounding_of_the_cores(case, method, bond, rtol):
    shape, matrix, epsilon = case
    exact = widened(matrix)
    limit = {"rtol": rtol} if rtol else {"max_bond": bond}
    mpo, info = tn.decompose(matrix, shape, method=method, return_info=True, **limit)
    error = dense_norm(chain(mpo) - padded_to(exact, chain(mpo)))
    slack = 4 * shape.sites * epsilon * dense_norm(exact)
    assert error == pytest.approx(info.error_bound, abs=slack)
    assert rtol is None or error <= rtol * dense_norm(exact) + slack
    assert all(core.dtype == matrix.dtype for core in mpo.cores)


@given(halves)
def test_what_is_computed_from_one_operator_is_right_to_its_precision(case):
    shape, matrix, epsilon = case
    mpo = tn.decompose(matrix, shape)
    whole = chain(mpo)
    norm = dense_norm(whole)
    slack = 4 * shape.sites * epsilon
    assert mpo.to_matrix().dtype == mpo.norm().dtype == matrix.dtype
    if norm < 200:  # The square of the norm fits float16.
        assert mpo.inner(mpo).dtype == matrix.dtype
        assert float(mpo.inner(mpo)) == pytest.approx(norm**2, rel=2 * epsilon, abs=1e-4)
    assert float(mpo.norm()) == pytest.approx(norm, rel=2 * epsilon, abs=1e-4)
    cropped = whole[: shape.out_features, : shape.in_features]
    assert dense_norm(widened(mpo.to_matrix()) - cropped) <= epsilon * norm
    vector = matrix[0]
    expected = cropped @ widened(vector)
    applied = mpo.apply(vector)
    assert applied.dtype == matrix.dtype
    # Below its normal numbers, float16 has steps of 2⁻²⁴.
    steps = 2.0**-24 * sqrt(shape.out_features)
    limit = slack * norm * dense_norm(widened(vector)) + steps
    assert dense_norm(widened(applied) - expected) <= limit
    for bond in range(shape.sites - 1):
        entropy = float(mpo.entropy(bond))
        wide = tn.MPO([widened(core) for core in mpo.cores], shape)
        assert entropy == pytest.approx(float(wide.entropy(bond)), abs=2e-2)


@given(halves, st.integers(1, 6), st.sampled_from(("successive", "direct", "randomized")))
def test_rounded_sums_and_compressions_keep_the_dtype_and_are_near_the_best(case, bond, method):
    shape, matrix, epsilon = case
    mpo = tn.decompose(matrix, shape)
    norm = dense_norm(chain(mpo))
    slack = 8 * shape.sites * epsilon * norm
    wide = tn.MPO([widened(core) for core in mpo.cores], shape)
    _, best = wide.compress(max_bond=bond, return_info=True)
    small, info = mpo.compress(max_bond=bond, return_info=True)
    # Where Schmidt values are equal, rounding decides which are kept: both are within this factor
    # of the best that there is.
    assert info.error_bound <= sqrt(shape.sites) * best.error_bound + slack
    assert dense_norm(chain(small) - chain(mpo)) <= info.error_bound + slack
    total = tn.add([mpo, mpo], max_bond=bond, method=method)
    assert total.dtype == small.dtype == matrix.dtype
    assert dense_norm(chain(total) - 2 * chain(mpo)) <= 6 * best.error_bound + 2 * slack


@pytest.mark.parametrize(("library", "dtype"), HALVES)
@pytest.mark.parametrize("method", ["direct", "zipup", "randomized"])
def test_rounded_products_keep_the_dtype_and_the_accuracy(library, dtype, method):
    shape = tn.MPOShape((4, 3, 4), (4, 3, 4))
    matrix = make_matrix("gaussian", 48, 48, "float32", 0) / 7
    a = tn.decompose(to_half(matrix, library, dtype), shape, max_bond=3)
    b = tn.decompose(to_half(matrix.T.copy(), library, dtype), shape, max_bond=3)
    product = tn.matmul(a, b, method=method, max_bond=9)
    assert product.dtype == a.dtype
    expected = chain(a) @ chain(b)
    assert dense_norm(chain(product) - expected) <= 12 * EPSILON[dtype] * dense_norm(expected)
    fitted = tn.fit(a, max_bond=3)
    assert fitted.dtype == a.dtype
    assert dense_norm(chain(fitted) - chain(a)) <= 12 * EPSILON[dtype] * dense_norm(chain(a))


@pytest.mark.parametrize(("library", "dtype"), HALVES)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_numbers_near_the_ends_of_the_range_survive(library, dtype, scale):
    matrix = to_half(np.full((16, 16), scale, "float32"), library, dtype)
    mpo = tn.decompose(matrix, tn.MPOShape((4, 4), (4, 4)), rtol=0.01)
    assert mpo.bond_dims == (1,)
    np.testing.assert_allclose(chain(mpo), widened(matrix), rtol=4 * EPSILON[dtype])


@pytest.mark.parametrize(
    ("library", "dtype", "scale"),
    [
        ("numpy", "float16", 6e4),
        ("torch", "float16", 6e4),
        ("torch", "bfloat16", 3e38),
        ("numpy", "float32", 3e38),
        ("torch", "float32", 3e38),
    ],
)
def test_a_core_that_cannot_hold_the_norm_is_refused_and_not_infinite(library, dtype, scale):
    """Every entry fits the dtype, their norm, which the centre holds, does not."""
    matrix = to_half(np.full((16, 16), scale, "float32"), library, dtype)
    with pytest.raises(tn.InputError, match=f"more than {dtype} can hold"):
        tn.decompose(matrix, tn.MPOShape((4, 4), (4, 4)), rtol=0.01)


@pytest.mark.parametrize(("library", "dtype"), HALVES)
def test_long_sums_are_not_accumulated_in_half_precision(library, dtype):
    """4096 ones sum to 256 in bfloat16 and to 2048 in float16, if added one by one."""
    shape = tn.MPOShape((1, 1), (64, 64))
    ones = to_half(np.ones((1, 4096), "float32"), library, dtype)
    mpo = tn.decompose(ones, shape, max_bond=1)
    assert float(mpo.apply(ones[0])[0]) == pytest.approx(4096, rel=4 * EPSILON[dtype])
    assert float(mpo.inner(mpo)) == pytest.approx(4096, rel=4 * EPSILON[dtype])
