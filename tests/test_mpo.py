"""MPO: applying, norms, gauges and spectra, against dense algebra."""

import pickle
from decimal import Decimal
from fractions import Fraction
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.backend_toy  # noqa: F401  # registers the toy
import tnmoe as tn
from tests.backend_toy_array import ToyArray
from tests.matrices import (
    LIBRARIES,
    dense_norm,
    libraries,
    matrices,
    rounding,
    to_library,
    to_numpy,
)
from tests.test_decompose import assert_canonical

max_bonds = st.one_of(st.none(), st.integers(1, 6))


@given(matrices, libraries, max_bonds, st.sampled_from([(), (0,), (1,), (7,), (2, 0, 3), (2, 3)]))
def test_apply_equals_the_dense_product_for_any_batch(case, library, max_bond, batch):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=max_bond)
    x = np.random.default_rng(0).standard_normal((*batch, shape.in_features)).astype(matrix.dtype)
    result = mpo.apply(to_library(x, library))
    assert result.dtype == mpo.dtype
    expected = x @ to_numpy(mpo.to_matrix()).T
    assert result.shape == expected.shape
    tolerance = rounding(matrix) * max(1.0, dense_norm(x))
    np.testing.assert_allclose(to_numpy(result), expected, atol=tolerance)


@given(matrices, libraries, max_bonds)
def test_norm_is_the_frobenius_norm_with_and_without_a_known_centre(case, library, max_bond):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=max_bond)
    # Without the shape there is no padding to crop: the norm is that of the whole chain.
    expected = dense_norm(to_numpy(tn.MPO(mpo.cores).to_matrix()))
    for operator in (mpo, tn.MPO(mpo.cores, mpo.shape)):
        assert float(operator.norm()) == pytest.approx(expected, abs=rounding(matrix))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1e-170, 1e-110, 1.0, 1e110, 1e170])
def test_norms_whose_squares_leave_the_dtype_are_right(scale, library):
    shape = tn.MPOShape((2, 3, 2), (3, 2, 2))
    one = tn.MPO.random(shape, 4, rng=0, like=to_library(np.zeros(()), library))
    expected = dense_norm(to_numpy(one.to_matrix())) * scale
    assert float((one * scale).norm()) == pytest.approx(expected, rel=1e-12, abs=0)


@given(matrices, libraries, max_bonds, st.data())
def test_canonicalize_moves_the_centre_and_keeps_the_operator(case, library, max_bond, data):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=max_bond)
    center_site = data.draw(st.integers(0, shape.sites - 1))
    scrambled = tn.MPO(mpo.cores, mpo.shape)
    for operator in (mpo, scrambled):
        moved = operator.canonicalize(center_site)
        assert moved.center_site == center_site
        assert_canonical(moved, center_site)
        assert all(new <= old for new, old in zip(moved.bond_dims, mpo.bond_dims, strict=True))
        difference = to_numpy(moved.to_matrix()) - to_numpy(mpo.to_matrix())
        assert dense_norm(difference) <= rounding(matrix)


def test_moving_the_centre_leaves_the_sites_it_does_not_pass_untouched():
    matrix = np.random.default_rng(0).standard_normal((32, 32))
    mpo = tn.decompose(matrix, tn.MPOShape((2,) * 5, (2,) * 5), center_site=1)
    moved = mpo.canonicalize(3)
    for site in (0, 4):
        assert moved.cores[site] is mpo.cores[site]


@given(matrices, libraries, st.data())
def test_schmidt_values_are_the_singular_values_across_the_bond(case, library, data):
    shape, matrix = case
    if shape.sites == 1:
        return
    bond = data.draw(st.integers(0, shape.sites - 2))
    array = to_library(matrix, library)
    mpo, info = tn.decompose(array, shape, method="svd", return_info=True)
    values = to_numpy(mpo.schmidt_values(bond))
    np.testing.assert_allclose(values, to_numpy(info.spectra[bond]), atol=rounding(matrix))
    assert float(np.linalg.norm(values.astype("float64"))) == pytest.approx(
        dense_norm(matrix), abs=rounding(matrix)
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_gauges_of_complex_cores_with_tiny_entries_are_finite(library):
    """Torch's QR made NaN of the isometries of this decomposition, which the padding fills up."""
    matrix = np.array([[0.126 - 0.536j], [-0.132 + 0.362j], [0.64 + 1.304j], [0.105 + 0.947j]])
    shape = tn.MPOShape((2, 2, 1), (4, 1, 4), in_features=1)
    for scale in (1.0, 0.998, 1.0003):
        single = to_library((scale * matrix).astype("complex64"), library)
        mpo = tn.decompose(single, shape, method="svd")
        for bond in range(2):
            values = to_numpy(mpo.schmidt_values(bond))
            assert float(np.linalg.norm(values)) == pytest.approx(
                scale * dense_norm(matrix), rel=1e-5
            )


@pytest.mark.parametrize("library", LIBRARIES)
def test_entropy_runs_from_zero_for_products_to_log_of_the_bond(library):
    shape = tn.MPOShape((2, 2), (2, 2))
    product = np.kron(np.array([[1.0, 2.0], [3.0, 4.0]]), np.eye(2))
    swap = np.eye(4)[[0, 2, 1, 3]]  # all four Schmidt values equal
    for matrix, expected in ((product, 0.0), (swap, log(4)), (np.zeros((4, 4)), 0.0)):
        mpo = tn.decompose(to_library(matrix, library), shape)
        assert mpo.entropy(0) == pytest.approx(expected, abs=1e-12)


def test_an_mpo_is_immutable_and_survives_pickling():
    mpo = tn.decompose(np.arange(12.0).reshape(4, 3), tn.MPOShape((2, 2), (3, 1)))
    with pytest.raises(AttributeError, match="immutable"):
        mpo.center_site = 0
    copy = pickle.loads(pickle.dumps(mpo))
    assert copy.shape == mpo.shape
    assert copy.center_site == mpo.center_site
    np.testing.assert_allclose(copy.to_matrix(), mpo.to_matrix(), rtol=1e-5)


def test_gradients_reach_cores_and_vectors():
    mpo = tn.decompose(torch.randn(8, 8, dtype=torch.float64), tn.MPOShape((2, 4), (4, 2)))
    cores = [core.clone().requires_grad_() for core in mpo.cores]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def applied(x, *cores):
        operator = tn.MPO(cores, mpo.shape)
        return operator.apply(x), operator.to_matrix(), operator.norm()

    assert torch.autograd.gradcheck(applied, (x, *cores))


def test_the_plan_takes_the_route_with_fewer_operations():
    shape = tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    few, many = tn.contraction_plan(shape, (4,) * 4), tn.contraction_plan(shape, batch=4096)
    assert few.route == "chain"
    assert few.flops < 2 * 3072 * 768  # less than the dense product alone
    assert many.route == "rebuilt"
    assert 0 <= many.flops - 2 * 4096 * 3072 * 768 < 1e10  # the product, and building the matrix
    assert "route chain" in str(few)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tn.MPO([]), tn.InputError, "at least one core"),
        (lambda: tn.MPO([np.ones((1, 2, 2))]), tn.InputError, "needs axes"),
        (lambda: tn.MPO([np.ones((1, 2, 2, 2))]), tn.InputError, "outermost bonds must be 1"),
        (
            lambda: tn.MPO([np.ones((1, 2, 2, 2)), np.ones((3, 2, 2, 1))]),
            tn.InputError,
            "neighbouring cores need equal bonds",
        ),
        (
            lambda: tn.MPO([np.ones((1, 2, 2, 2)), np.ones((2, 2, 2, 1), "float32")]),
            tn.InputError,
            "one library and one dtype",
        ),
        (
            lambda: tn.MPO([np.ones((1, 2, 2, 2)), torch.ones(2, 2, 2, 1)]),
            tn.InputError,
            "one library and one dtype",
        ),
        (lambda: tn.MPO([np.ones((1, 2, 2, 1), int)]), tn.InputError, "got dtype int64"),
        (
            lambda: tn.MPO([np.ones((1, 2, 2, 1))], tn.MPOShape((2,), (3,))),
            tn.InputError,
            "do not fit",
        ),
        *(
            (
                lambda center_site=center_site: tn.MPO(
                    [np.ones((1, 2, 2, 1))], center_site=center_site
                ),
                tn.InputError,
                "center_site must be an integer from 0 to 0, got",
            )
            for center_site in (1, -1, 0.0, True, "0")
        ),
        (
            lambda: tn.MPO([np.ones((1, 2, 2, 0)), np.ones((0, 2, 2, 1))]),
            tn.InputError,
            "bonds must be at least 1",
        ),
        *(
            (call, tn.InputError, "the cores of an operator contain NaN or infinity")
            for call in (
                lambda: with_nan().compress(),
                lambda: with_nan("float32").compress(max_bond=1),
                lambda: with_nan().schmidt_values(0),
                lambda: with_nan().entropy(0),
                lambda: with_nan().vidal(),
                lambda: tn.fit(with_nan(), max_bond=1),
                lambda: tn.add([with_nan()] * 3, method="randomized", max_bond=1),
            )
        ),
        (
            lambda: tn.MPO.identity(tn.MPOShape((2, 2), (2, 2))).schmidt_values(True),
            tn.InputError,
            "bond must be an integer from 0 to 0, got True",
        ),
        (lambda: tn.MPOShape((2, 2), (2, 2)).is_split(2), tn.InputError, "from 0 to 1, got 2"),
        (lambda: tn.MPO([[1.0]]), TypeError, "expected an array"),
        (lambda: simple().apply(np.ones(3)), tn.InputError, r"2 entries .* got shape \(3,\)"),
        (lambda: simple().apply(np.float64(3)), tn.InputError, r"got shape \(\)"),
        (lambda: simple().apply(torch.ones(2)), TypeError, "numpy arrays, x is a Tensor"),
        (
            lambda: simple().canonicalize(1),
            tn.InputError,
            "center_site must be an integer from 0 to 0",
        ),
        (
            lambda: simple().schmidt_values(0),
            tn.InputError,
            "bond must lie between two sites, and there is one: got 0",
        ),
        (
            lambda: tn.contraction_plan(tn.MPOShape((2, 2), (2, 2)), (1, 1)),
            tn.InputError,
            "1 bonds",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("cores", "vectors", "result"),
    [
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("float32", "complex64", "complex64"),
        ("complex64", "float64", "complex128"),
    ],
)
def test_vectors_of_another_dtype_give_what_numpy_would(library, cores, vectors, result):
    like = to_library(np.zeros((), cores), library)
    mpo = tn.MPO.random(tn.MPOShape((2, 3), (3, 2)), 3, rng=0, like=like)
    x = np.random.default_rng(1).standard_normal((4, 6)).astype(vectors)
    applied = to_numpy(mpo.apply(to_library(x, library)))
    assert applied.dtype == result
    expected = x @ to_numpy(mpo.to_matrix()).T
    np.testing.assert_allclose(applied, expected, rtol=1e-5, atol=1e-5)


def with_nan(dtype: str = "float64") -> tn.MPO:
    cores = [np.ones((1, 2, 2, 3), dtype), np.full((3, 2, 2, 1), np.nan, dtype)]
    return tn.MPO(cores)


def test_indices_may_be_those_of_numpy():
    mpo = tn.MPO.random(tn.MPOShape((2, 2), (2, 2)), 2, rng=0)
    moved = mpo.canonicalize(np.int64(1))
    assert moved.center_site == 1
    assert type(moved.center_site) is int
    assert moved.schmidt_values(np.int32(0)).shape == (2,)


def simple() -> tn.MPO:
    return tn.MPO([np.ones((1, 2, 2, 1))])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("sites", [1, 3])
def test_numpy_takes_an_operator_as_its_matrix(library, sites):
    shape = tn.MPOShape((6,), (4,)) if sites == 1 else tn.MPOShape((2, 3, 1), (2, 1, 2))
    mpo = tn.MPO.random(shape, rng=0, like=to_library(np.zeros((), np.float32), library))
    expected = to_numpy(mpo.to_matrix())
    for array in (np.asarray(mpo), np.array(mpo), np.stack([mpo, mpo])[0]):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)
    assert np.asarray(mpo, dtype=np.complex128).dtype == np.complex128
    assert np.linalg.norm(mpo) == pytest.approx(float(mpo.norm()))
    with pytest.raises(ValueError, match="a copy is needed"):
        mpo.__array__(copy=False)
    np.array(mpo)[:] = 0
    np.testing.assert_array_equal(to_numpy(mpo.to_matrix()), expected)
    shared = tn.SharedMPO.replicate(tn.kron(mpo, mpo), 3)
    np.testing.assert_array_equal(np.asarray(shared), to_numpy(shared.to_matrices()))


def test_numpy_takes_half_precision_and_what_has_gradients():
    mpo = tn.decompose(torch.eye(4, dtype=torch.bfloat16), tn.MPOShape((2, 2), (2, 2)))
    cores = [core.float().requires_grad_() for core in mpo.cores]
    for each in (mpo, tn.MPO(cores)):
        np.testing.assert_array_equal(np.asarray(each), np.eye(4))


@pytest.mark.parametrize("library", LIBRARIES)
def test_sum_adds_operators(library):
    like = to_library(np.zeros(()), library)
    a, b = (tn.MPO.random(tn.MPOShape((2, 3), (3, 2)), 2, rng=seed, like=like) for seed in (0, 1))
    expected = to_numpy(a.to_matrix()) + to_numpy(b.to_matrix())
    np.testing.assert_allclose(to_numpy(sum([a, b]).to_matrix()), expected, atol=1e-12)
    np.testing.assert_allclose(to_numpy(sum([b], start=a).to_matrix()), expected, atol=1e-12)
    assert 0 + a is a
    for wrong in (1, 0.5, "0", None):
        with pytest.raises(TypeError):
            wrong + a


# Numbers that are 3, of every kind.
THREES = {
    "int": 3,
    "Fraction": Fraction(3),
    "Decimal": Decimal(3),
    "np.int64": np.int64(3),
    "np.float32": np.float32(3),
    "np.float64": np.float64(3),
    "np.array": np.array(3.0),
    "torch int": torch.tensor(3),
    "torch float": torch.tensor(3.0),
    "torch double": torch.tensor(3.0, dtype=torch.float64),
    "toy float": ToyArray(np.array(3.0, np.float32)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", THREES)
def test_numbers_of_every_library_multiply_and_divide_on_both_sides(library, name, dtype):
    three, eps = THREES[name], np.finfo(dtype).eps
    like = to_library(np.zeros((), dtype), library)
    mpo = tn.MPO.random(tn.MPOShape((2, 3), (3, 2)), 2, rng=0, like=like)
    expected = to_numpy(mpo.to_matrix()).astype("float64")
    for result, factor in ((three * mpo, 3), (mpo * three, 3), (mpo / three, 1 / 3)):
        assert isinstance(result, tn.MPO)
        assert result.dtype == mpo.dtype
        assert {core.dtype for core in result.cores} == {mpo.dtype}
        matrix = to_numpy(result.to_matrix())
        np.testing.assert_allclose(matrix, factor * expected, rtol=4 * eps, atol=4 * eps)


def test_gradients_reach_a_number_of_the_same_library_and_are_never_lost_silently():
    mpo = tn.MPO.random(tn.MPOShape((2, 3), (3, 2)), 2, rng=0, like=torch.zeros(()))
    number = torch.tensor(3.0, requires_grad=True)
    for result in (number * mpo, mpo / number):
        (gradient,) = torch.autograd.grad(result.to_matrix().sum(), number)
        assert gradient != 0
    with pytest.raises(tn.InputError, match=r"a torch number with gradients .* numpy cores"):
        number * tn.MPO.random(mpo.shape, 2, rng=0)


@pytest.mark.parametrize("wrong", [np.ones(3), np.ones((1, 1)), torch.ones(3), "3", None, [3]])
def test_what_is_no_number_does_not_multiply(wrong):
    for mpo in (simple(), tn.MPO.random(tn.MPOShape((2,), (2,)), like=torch.zeros(()))):
        for operation in (
            lambda mpo=mpo: wrong * mpo,
            lambda mpo=mpo: mpo * wrong,
            lambda mpo=mpo: mpo / wrong,
            lambda mpo=mpo: 2 / mpo,
        ):
            with pytest.raises(TypeError):
                operation()


def test_division_by_zero_and_complex_factors_of_real_cores_are_refused():
    for zero in (0, 0.0, np.float32(0)):
        with pytest.raises(ZeroDivisionError):
            simple() / zero
    for factor in (1j, np.complex64(1j), torch.tensor(1j)):
        with pytest.raises(tn.InputError, match=r"real cores \(float64\) by a complex"):
            factor * simple()


def test_numpy_numbers_do_not_make_experts_dense():
    shared = tn.SharedMPO.replicate(tn.MPO.random(tn.MPOShape((2, 3), (3, 2)), 2, rng=0), 2)
    for number in (2, np.float64(2), np.ones((6, 6))):
        with pytest.raises(TypeError):
            number * shared
