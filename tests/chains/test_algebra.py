"""Algebra of MPOs against dense algebra: sums, products, transposes, traces and inner products."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    DTYPES,
    LIBRARIES,
    dense_norm,
    libraries,
    make_matrix,
    matrices,
    rounding,
    shapes,
    to_library,
    to_numpy,
)
from tnmoe.backends import backend_named
from tnmoe.interop import to_quimb

max_bonds = st.one_of(st.none(), st.integers(1, 4))
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)


def random_mpo(shape, dtype, library, seed, max_bond=None):
    like = to_library(np.zeros((), dtype), library)
    return tn.MPO.random(shape, max_bond, rng=seed, like=like)


def dense(mpo):
    return to_numpy(mpo.to_matrix())


def assert_close(actual, expected, scale):
    """Equal up to rounding of numbers as large as ``scale``."""
    actual = to_numpy(actual)
    assert actual.dtype == expected.dtype
    assert np.abs(actual - expected).max(initial=0) <= 1e3 * np.finfo(actual.dtype).eps * scale


@given(shapes(), dtypes, libraries, seeds, max_bonds)
def test_sums_differences_and_multiples_are_those_of_the_matrices(
    shape, dtype, library, seed, max_bond
):
    a = random_mpo(shape, dtype, library, seed, max_bond)
    b = random_mpo(shape, dtype, library, seed + 1)
    scale = dense_norm(dense(a)) + dense_norm(dense(b)) + 1
    assert_close((a + b).to_matrix(), dense(a) + dense(b), scale)
    assert_close((a - b).to_matrix(), dense(a) - dense(b), scale)
    assert_close((-2.5 * a).to_matrix(), -np.asarray(2.5, dtype) * dense(a), scale)
    assert_close((a / 4).to_matrix(), dense(a) / np.asarray(4, dtype), scale)
    if shape.sites > 1:
        assert (a + b).bond_dims == tuple(map(sum, zip(a.bond_dims, b.bond_dims, strict=True)))


@given(shapes(max_size=900), dtypes, libraries, seeds, max_bonds, st.data())
def test_composition_is_the_matrix_product_padded_or_not(
    shape, dtype, library, seed, max_bond, data
):
    legs = data.draw(st.tuples(*(st.integers(1, 3) for _ in shape.in_dims)))
    inner = tn.MPOShape(shape.in_dims, legs, shape.in_features)
    a = random_mpo(shape, dtype, library, seed, max_bond)
    b = random_mpo(inner, dtype, library, seed + 1, 2)
    expected = dense(a) @ dense(b)
    scale = dense_norm(dense(a)) * dense_norm(dense(b)) + 1
    assert_close((a @ b).to_matrix(), expected, scale)
    assert_close((b.H @ a.H).to_matrix(), expected.conj().T, scale)


@given(shapes(), dtypes, libraries, seeds, max_bonds)
def test_hadamard_is_the_product_of_the_entries(shape, dtype, library, seed, max_bond):
    a = random_mpo(shape, dtype, library, seed, max_bond)
    b = random_mpo(shape, dtype, library, seed + 1, 2)
    scale = dense_norm(dense(a)) * dense_norm(dense(b)) + 1
    assert_close(a.hadamard(b).to_matrix(), dense(a) * dense(b), scale)
    assert a.hadamard(b).bond_dims == tuple(np.multiply(a.bond_dims, b.bond_dims))


@given(shapes(), dtypes, libraries, seeds)
def test_transpose_adjoint_and_conjugate_are_those_of_the_matrix(shape, dtype, library, seed):
    a = random_mpo(shape, dtype, library, seed)
    np.testing.assert_array_equal(dense(a.T.T), dense(a))
    scale = dense_norm(dense(a))
    assert_close(a.T.to_matrix(), dense(a).T, scale)
    assert_close(a.H.to_matrix(), dense(a).conj().T, scale)
    assert_close(a.conj().to_matrix(), dense(a).conj(), scale)


@given(shapes(max_size=900), dtypes, libraries, seeds, st.data())
def test_trace_and_identity_of_square_legs_padded_or_not(shape, dtype, library, seed, data):
    size = data.draw(st.integers(1, shape.padded_out))
    square = tn.MPOShape(shape.out_dims, shape.out_dims, size, size)
    a = random_mpo(square, dtype, library, seed, 3)
    assert_close(a.trace(), np.trace(dense(a)).astype(dtype), dense_norm(dense(a)) * size)
    one = tn.MPO.identity(square, like=a.cores[0])
    np.testing.assert_array_equal(dense(one), np.eye(size, dtype=dtype))
    assert float(one.norm()) == pytest.approx(size**0.5)
    assert_close((one @ a).to_matrix(), dense(a), dense_norm(dense(a)) + 1)


@given(shapes(max_sites=4, max_size=900), dtypes, libraries, seeds, st.data())
def test_a_partial_trace_sums_the_diagonals_of_its_sites(shape, dtype, library, seed, data):
    every = st.sets(st.integers(0, shape.sites - 1), min_size=1)
    traced = sorted(data.draw(every))
    in_dims = [
        out if site in traced else in_
        for site, (out, in_) in enumerate(zip(shape.out_dims, shape.in_dims, strict=True))
    ]
    in_features = data.draw(st.one_of(st.none(), st.integers(1, np.prod(in_dims).item())))
    square = tn.MPOShape(shape.out_dims, in_dims, shape.out_features, in_features)
    a = random_mpo(square, dtype, library, seed, 3)
    # The padding may hold anything; it counts as zeros.
    padded = np.zeros((square.padded_out, square.padded_in), dtype)
    padded[: square.out_features, : square.in_features] = dense(a)
    tensor = padded.reshape(*square.out_dims, *square.in_dims)
    for site in reversed(traced):
        tensor = tensor.trace(axis1=site, axis2=tensor.ndim // 2 + site)
    scale = dense_norm(padded) * square.padded_out + 1
    found = a.partial_trace(data.draw(st.permutations(traced)))
    if len(traced) == shape.sites:
        assert found.shape == ()
        assert_close(found, np.asarray(tensor), scale)
        return
    rows = np.prod(tensor.shape[: tensor.ndim // 2]).item()
    assert_close(found.to_matrix(), tensor.reshape(rows, -1), scale)


def test_the_partial_trace_of_one_site_takes_its_number():
    a = random_mpo(tn.MPOShape((2, 3), (2, 3)), "float64", "numpy", 0)
    np.testing.assert_array_equal(dense(a.partial_trace(1)), dense(a.partial_trace([1])))


@given(shapes(), dtypes, libraries, seeds, max_bonds)
def test_inner_is_the_frobenius_inner_product_of_the_chains(shape, dtype, library, seed, max_bond):
    unpadded = tn.MPOShape(shape.out_dims, shape.in_dims)
    a = random_mpo(unpadded, dtype, library, seed, max_bond)
    b = random_mpo(unpadded, dtype, library, seed + 1)
    scale = dense_norm(dense(a)) * dense_norm(dense(b)) + 1
    assert_close(a.inner(b), np.vdot(dense(a), dense(b)).astype(dtype), scale)
    assert abs(complex(a.inner(a))) == pytest.approx(float(a.norm()) ** 2, rel=1e-4)


@given(shapes(max_sites=2, max_size=100), shapes(max_sites=2, max_size=100), dtypes, libraries)
def test_kron_is_the_kronecker_product(left, right, dtype, library):
    right = tn.MPOShape(right.out_dims, right.in_dims)
    a, b = random_mpo(left, dtype, library, 0), random_mpo(right, dtype, library, 1)
    expected = np.kron(dense(a), dense(b))
    assert_close(tn.kron(a, b).to_matrix(), expected, dense_norm(expected) + 1)


@given(matrices, libraries)
def test_scalar_multiples_and_adjoints_keep_the_centre_sums_lose_it(case, library):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=3)
    for same in (2 * mpo, mpo / 2, -mpo, mpo.conj(), mpo.T, mpo.H):
        assert same.center_site == mpo.center_site
        assert float(same.norm()) == pytest.approx(
            float(tn.MPO(same.cores).norm()), abs=2 * rounding(matrix)
        )
    assert (mpo + mpo).center_site is None


@pytest.mark.parametrize("library", LIBRARIES)
def test_matmul_with_arrays_follows_the_matrix_product(library):
    mpo = random_mpo(tn.MPOShape((2, 3), (2, 2)), "float64", library, 0)
    vector, columns = np.arange(4.0), np.arange(12.0).reshape(4, 3)
    for x in (vector, columns):
        np.testing.assert_allclose(to_numpy(mpo @ to_library(x, library)), dense(mpo) @ x)
    with pytest.raises(tn.InputError, match=r"shape \(1, 4, 3\): use mpo.apply"):
        mpo @ to_library(columns[None], library)


def test_random_entries_have_unit_variance():
    shape = tn.MPOShape((4, 4, 4), (4, 4, 4))
    squares = [tn.MPO.random(shape, 3, rng=seed).norm() ** 2 for seed in range(200)]
    assert np.mean(squares) == pytest.approx(64 * 64, rel=0.15)


def test_one_seed_gives_the_same_operator_in_every_library():
    shape = tn.MPOShape((2, 3), (3, 2))
    pairs = zip(
        *(random_mpo(shape, "float32", library, 7).cores for library in LIBRARIES), strict=True
    )
    for first, *others in pairs:
        for other in others:
            np.testing.assert_allclose(first, to_numpy(other), rtol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept_and_summed_in_single(library, dtype):
    if library != "torch" and dtype == "bfloat16":
        pytest.skip(f"{library} has no bfloat16")
    shape = tn.MPOShape((4, 4), (4, 4))
    like = backend_named(library).astype(to_library(np.zeros(()), library), dtype)
    a = tn.MPO.random(shape, rng=0, like=like)
    for result in (a + a, a @ a, 2 * a, a.T):
        assert result.dtype == like.dtype
    assert a.inner(a).dtype == like.dtype
    assert float(a.inner(a)) == pytest.approx(float(a.norm()) ** 2, rel=0.02)
    assert a.trace().dtype == like.dtype


def test_gradients_of_every_operation_agree_with_finite_differences():
    shape = tn.MPOShape((2, 2), (2, 2), 3, 3)
    for dtype in (torch.float64, torch.complex128):
        like = torch.zeros((), dtype=dtype)
        a, b = tn.MPO.random(shape, 2, 0, like), tn.MPO.random(shape, 2, 1, like)
        cores = [core.clone().requires_grad_() for core in (*a.cores, *b.cores)]
        factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

        def everything(factor, *cores):
            a, b = tn.MPO(cores[:2], shape), tn.MPO(cores[2:], shape)
            operators = (
                a + b,
                a - b,
                a * factor,
                a @ b,
                a.T,
                a.H,
                a.conj(),
                a.compress(max_bond=1),
                a.hadamard(b),
                a.partial_trace(0),
            )
            return (*(one.to_matrix() for one in operators), a.inner(b), a.trace(), a.norm())

        assert torch.autograd.gradcheck(everything, (factor, *cores))


def test_quimb_finds_the_same_sum_product_trace_and_overlap():
    shape = tn.MPOShape((2, 3, 2), (2, 3, 2))
    a, b = tn.MPO.random(shape, 3, rng=0), tn.MPO.random(shape, 2, rng=1)
    qa, qb = to_quimb(a), to_quimb(b)
    np.testing.assert_allclose(dense(a + b), (qa + qb).to_dense())
    np.testing.assert_allclose(dense(a @ b), qa.apply(qb).to_dense())
    np.testing.assert_allclose(a.trace(), qa.trace())
    np.testing.assert_allclose(a.inner(b), qa.H.overlap(qb.H))


def two(dtype="float64", library="numpy"):
    return random_mpo(tn.MPOShape((2, 2), (2, 3)), dtype, library, 0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: two() + two().T, tn.InputError, "a sum needs operators of one shape"),
        (lambda: two() @ two(), tn.InputError, "are not the output legs of"),
        (lambda: two() + two("float32"), tn.InputError, "one dtype, got float64 and float32"),
        (lambda: two() + two(library="torch"), TypeError, "one library, got numpy and torch"),
        (lambda: two() + 1, TypeError, "unsupported operand"),
        (lambda: two() * "2", TypeError, "can't multiply|unsupported operand"),
        (lambda: two() * 1j, tn.InputError, r"real cores \(float64\) by a complex 1j"),
        (lambda: two().inner(np.ones(3)), TypeError, "expected an MPO, got ndarray"),
        (
            lambda: two().inner(two().T),
            tn.InputError,
            "an inner product needs operators of one shape",
        ),
        (lambda: two().hadamard(two().T), tn.InputError, "an entrywise product needs operators"),
        (lambda: two().partial_trace(1), tn.InputError, r"equal output .* at the sites \(1,\)"),
        (lambda: two().partial_trace([0, 0]), tn.InputError, r"none twice, got \[0, 0\]"),
        (lambda: two().partial_trace(()), tn.InputError, r"at least one site, .* got \[\]"),
        (lambda: two().partial_trace(2), tn.InputError, "every site of sites must be"),
        (lambda: two().trace(), tn.InputError, "a trace needs equal output and input legs"),
        (lambda: tn.MPO.identity(two().shape), tn.InputError, "the identity needs equal"),
        (
            lambda: tn.kron(two(), tn.MPO.zeros(tn.MPOShape((2,), (2,), 1))),
            tn.InputError,
            "must not be padded",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("library", LIBRARIES)
def test_numpy_scalars_multiply_from_either_side_and_keep_the_dtype(library):
    mpo = two("float32", library)
    for scaled in (np.float64(2) * mpo, mpo * np.float64(2), mpo * np.array(2)):
        assert scaled.dtype == mpo.dtype
        np.testing.assert_allclose(dense(scaled), 2 * dense(mpo), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_scalars_of_the_library_multiply_and_divide(library):
    mpo = two("float32", library)
    norm = mpo.norm()
    np.testing.assert_allclose(dense(mpo * norm), float(norm) * dense(mpo), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(mpo / norm), dense(mpo) / float(norm), rtol=1e-5, atol=1e-6)
    with pytest.raises(tn.InputError, match="by a complex"):
        mpo * to_library(np.array(1j), library)


def test_zeros_are_zero():
    assert not make_matrix("zero", 4, 6, "float64", 0).any()
    assert not dense(tn.MPO.zeros(two().shape)).any()
