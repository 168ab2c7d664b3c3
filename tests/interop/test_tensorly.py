"""Independent oracle: the same operator in tensorly is the same matrix."""

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from tensorly.decomposition import tensor_train_matrix

import tnmoe as tn
from tests.interop.cases import max_bonds, operators, pairs_of_operators, unpadded
from tests.matrices import dense_norm, make_matrix, rounding
from tnmoe import interop


@settings(max_examples=60)
@given(unpadded, max_bonds)
def test_tensorly_reconstructs_the_same_matrix_and_round_trips(case, max_bond):
    shape, matrix = case
    mpo = tn.decompose(matrix, shape, max_bond=max_bond)
    theirs = interop.to_tensorly(mpo)
    assert dense_norm(theirs.to_matrix() - mpo.to_matrix()) <= rounding(matrix)
    back = interop.from_tensorly(theirs)
    assert back.shape == shape
    for old, new in zip(mpo.cores, back.cores, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("bond", [2, 4, 8])
def test_truncation_is_no_worse_than_tensorlys(bond):
    matrix = make_matrix("gaussian", 64, 64, "float64", 5) @ np.diag(0.9 ** np.arange(64))
    ours = tn.decompose(matrix, tn.MPOShape((4, 4, 4), (4, 4, 4)), max_bond=bond)
    theirs = tensor_train_matrix(tl.tensor(matrix.reshape((4,) * 6)), rank=[1, bond, bond, 1])
    error = dense_norm(theirs.to_matrix() - matrix)
    assert dense_norm(ours.to_matrix() - matrix) <= error * (1 + 1e-9)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda: tl.random.random_tt((3, 4, 3), [1, 2, 2, 1]), "got a TTTensor"),
        (lambda: tl.random.random_cp((3, 4), 2), "got a CPTensor"),
        (
            lambda: list(tl.random.random_tt((3, 4), [1, 2, 1])),
            r"a list of arrays with \[3, 3\] ax",
        ),
        (lambda: tl.tensor(np.ones((3, 4))), "got a ndarray"),
        (lambda: [np.ones((2, 2, 2, 2))], "outermost bonds must be 1"),
        (list, "at least one core"),
    ],
)
def test_what_is_no_operator_of_tensorly_is_refused(operator, message):
    with pytest.raises(tn.InputError, match=message):
        interop.from_tensorly(operator())


def test_cores_of_tensorly_come_over_as_a_list_and_in_one_dtype():
    theirs = tensor_train_matrix(tl.tensor(np.random.default_rng(0).random((4,) * 4)), rank=3)
    expected = theirs.to_matrix()
    cores = [theirs[0].astype(np.float32), theirs[1].astype(np.complex64)]
    for operator in (theirs, list(theirs), cores):
        np.testing.assert_allclose(interop.from_tensorly(operator).to_matrix(), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(operators)
def test_tensorly_reconstructs_sums_products_and_transposes(pair):
    a, b = pair
    x, y = (interop.to_tensorly(each).to_matrix() for each in pair)
    for ours, expected in (
        (a + b, x + y),
        (a @ b, x @ y),
        (a.T, x.T),
        (2 * a - b, 2 * x - y),
    ):
        theirs = interop.to_tensorly(ours).to_matrix()
        np.testing.assert_allclose(theirs, expected, atol=1e-10 * dense_norm(expected))


# At three sites the Kronecker product has up to 729 rows, at five 59049: 28 GB.
@settings(max_examples=40, deadline=None)
@given(pairs_of_operators(max_sites=3))
def test_tensorly_reconstructs_kronecker_products(pair):
    x, y = (interop.to_tensorly(each).to_matrix() for each in pair)
    theirs = interop.to_tensorly(tn.kron(*pair)).to_matrix()
    np.testing.assert_allclose(
        theirs, np.kron(x, y), atol=1e-10 * np.linalg.norm(x) * np.linalg.norm(y)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_tensorly_computes_with_tensors_of_torch_under_its_backend_of_torch(dtype):
    shape = tn.MPOShape((2, 3), (3, 2))
    mpo = tn.MPO.random(shape, rng=0, like=torch.zeros((), dtype=dtype))
    cores = [core.requires_grad_() for core in mpo.cores]
    with tl.backend_context("pytorch"):
        theirs = interop.to_tensorly(tn.MPO(cores)).to_matrix()
        torch.testing.assert_close(theirs, mpo.to_matrix())
        theirs.abs().sum().backward()
        assert all(core.grad is not None for core in cores)
        tensor = torch.randn((2, 3, 3, 2), dtype=dtype)
        decomposed = tensor_train_matrix(tensor, rank=[1, 6, 1])
    back = interop.from_tensorly(decomposed)
    assert back.dtype == dtype
    torch.testing.assert_close(back.to_matrix(), tensor.reshape(6, 6), atol=1e-4, rtol=1e-4)
