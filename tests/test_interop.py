"""Independent oracles: the same operator in tensorly and quimb is the same matrix."""

import numpy as np
import pytest
import quimb.tensor as qtn
import tensorly as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix

import tnmoe as tn
from tests.matrices import dense_norm, make_matrix, matrices, rounding
from tnmoe import interop

unpadded = matrices.filter(
    lambda case: (
        case[1].shape == (case[0].padded_out, case[0].padded_in)
        # tensorly's own reconstruction knows real numbers and more than one site only
        and case[0].sites > 1
    )
)
max_bonds = st.one_of(st.none(), st.integers(1, 8))


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


@settings(max_examples=60)
@given(unpadded, max_bonds)
def test_quimb_gives_the_same_matrix_and_round_trips(case, max_bond):
    shape, matrix = case
    mpo = tn.decompose(matrix, shape, max_bond=max_bond)
    theirs = interop.to_quimb(mpo)
    dense = theirs.to_dense()
    assert dense_norm(dense - mpo.to_matrix()) <= rounding(matrix)
    back = interop.from_quimb(theirs)
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


def test_an_operator_built_by_quimb_comes_over():
    theirs = qtn.MPO_rand(5, bond_dim=3, phys_dim=2, seed=1)
    mpo = interop.from_quimb(theirs)
    np.testing.assert_allclose(mpo.to_matrix(), theirs.to_dense(), atol=1e-12)


def test_what_others_cannot_express_is_refused():
    padded = tn.decompose(np.ones((3, 4)), tn.MPOShape((2, 2), (2, 2), out_features=3))
    for convert in (interop.to_tensorly, interop.to_quimb):
        with pytest.raises(tn.InputError, match="padded shapes"):
            convert(padded)
    with pytest.raises(tn.InputError, match="cyclic"):
        interop.from_quimb(qtn.MPO_rand(4, bond_dim=2, cyclic=True, seed=0))


def pairs_of_operators(max_sites):
    return st.builds(
        lambda dims, seed: tuple(
            tn.MPO.random(tn.MPOShape(dims, dims), 4, rng=seed + k) for k in range(2)
        ),
        st.lists(st.integers(2, 3), min_size=2, max_size=max_sites),
        st.integers(0, 2**32 - 1),
    )


operators = pairs_of_operators(max_sites=5)


@settings(max_examples=40, deadline=None)
@given(operators, st.integers(1, 5))
def test_quimb_rounds_sums_and_products_to_the_same_error(pair, max_bond):
    a, b = pair
    for ours, theirs in (
        (tn.add([a, b], max_bond=max_bond), interop.to_quimb(a) + interop.to_quimb(b)),
        (tn.matmul(a, b, max_bond=max_bond), interop.to_quimb(a).apply(interop.to_quimb(b))),
    ):
        exact = theirs.to_dense()
        theirs.compress(max_bond=max_bond, cutoff=0.0)
        error = dense_norm(ours.to_matrix() - exact)
        # Both are TT rounding; ours sweeps the other way, so that neither is always the better.
        assert error <= 1.5 * dense_norm(theirs.to_dense() - exact) + 1e-10 * dense_norm(exact)


@settings(max_examples=40, deadline=None)
@given(operators)
def test_quimb_finds_the_same_schmidt_values_and_norm(pair):
    operator, _ = pair
    # As a state of paired legs: the operator's Schmidt values are those of that state.
    arrays = [core.reshape(core.shape[0], -1, core.shape[-1]) for core in operator.cores]
    arrays[0], arrays[-1] = arrays[0][0], arrays[-1][..., 0]
    state = qtn.MatrixProductState(arrays, shape="lpr")
    np.testing.assert_allclose(float(operator.norm()), state.norm())
    for bond in range(operator.shape.sites - 1):
        theirs = state.schmidt_values(bond + 1) ** 0.5
        ours = operator.compress().schmidt_values(bond)
        np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-9 * theirs[0])


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
