"""Independent oracle: the same operator in quimb is the same matrix."""

from itertools import pairwise

import numpy as np
import pytest
import quimb.tensor as qtn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.interop.cases import max_bonds, operators, unpadded
from tests.matrices import dense_norm, rounding
from tnmoe import interop


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


def test_an_operator_built_by_quimb_comes_over():
    theirs = qtn.MPO_rand(5, bond_dim=3, phys_dim=2, seed=1)
    mpo = interop.from_quimb(theirs)
    np.testing.assert_allclose(mpo.to_matrix(), theirs.to_dense(), atol=1e-12)


def without_a_bond():
    """Sites 0 and 1, 2 and 3 are joined, 1 and 2 are not, as after a circuit of two gates."""
    left, right = (qtn.MPO_rand(2, 3, seed=seed) for seed in (1, 2))
    right.reindex_({"k0": "k2", "b0": "b2", "k1": "k3", "b1": "b3"})
    right.retag_({"I0": "I2", "I1": "I3"})
    return qtn.MatrixProductOperator.from_TN(
        left | right,
        cyclic=False,
        upper_ind_id="k{}",
        lower_ind_id="b{}",
        site_tag_id="I{}",
        L=4,
    )


def of_dims(*dims):
    rng = np.random.default_rng(3)
    bonds = [1, *[3] * (len(dims) - 1), 1]
    arrays = [
        rng.standard_normal((left, right, out, in_))
        for (out, in_), (left, right) in zip(dims, pairwise(bonds), strict=True)
    ]
    arrays[0], arrays[-1] = arrays[0][0], arrays[-1][:, 0]
    return qtn.MatrixProductOperator(arrays, shape="lrud")


def with_permuted_axes():
    operator = qtn.MPO_rand(4, 3, seed=1)
    for site, tensor in enumerate(operator):
        tensor.transpose_(*np.random.default_rng(site).permutation(tensor.inds))
    return operator


def renamed():
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator.upper_ind_id, operator.lower_ind_id = "out{}", "in{}"
    operator.site_tag_id = "site{}"
    return operator


def transposed():
    operator = of_dims((2, 3), (4, 2), (1, 5))
    operator.upper_ind_id = "other{}"
    operator.lower_ind_id = "k{}"
    operator.upper_ind_id = "b{}"
    return operator


def with_factors():
    operator = qtn.MPO_rand(4, 3, seed=1)
    for factor in (0.5, 3.0):
        operator.add_tensor(qtn.Tensor(factor))
    return operator


def with_exponent(exponent):
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator.exponent = exponent
    return operator


def with_bonds_of_one_around():
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator[0].new_ind("around"), operator[3].new_ind("around")
    return operator


def multiplied_without_contraction():
    """Two tensors per site, and two bonds between neighbours."""
    first, second = (qtn.MPO_rand(3, bond, seed=bond) for bond in (2, 3))
    first.reindex_lower_sites_("m{}"), second.reindex_upper_sites_("m{}")
    product = first | second
    return product.view_as_(
        qtn.MatrixProductOperator,
        upper_ind_id="k{}",
        lower_ind_id="b{}",
        site_tag_id="I{}",
        L=3,
        cyclic=False,
    )


def of_some_sites():
    arrays = [tensor.data for tensor in qtn.MPO_rand(3, 3, seed=1)]
    return qtn.MatrixProductOperator(arrays, sites=[1, 2, 5], L=7)


def with_a_matrix_on_a_bond():
    operator = qtn.MPO_rand(4, 3, seed=1)
    bond = operator.bond(1, 2)
    operator[2].reindex_({bond: "beyond"})
    operator.add_tensor(qtn.Tensor(np.arange(9.0).reshape(3, 3), inds=(bond, "beyond")))
    return operator


def of_mixed_dtypes():
    operator = qtn.MPO_rand(4, 3, seed=1, dtype="float32")
    operator[2].modify(data=operator[2].data * np.complex64(1j))
    return operator


NETWORKS = {
    "random": lambda: qtn.MPO_rand(5, 3, seed=1),
    "complex": lambda: qtn.MPO_rand(4, 3, seed=1, dtype="complex64"),
    "Hermitian": lambda: qtn.MPO_rand_herm(4, 3, seed=1),
    "an identity, without bonds": lambda: qtn.MPO_identity(3),
    "a product of matrices": lambda: qtn.MPO_product_operator([np.eye(2), np.ones((3, 3))]),
    "a Hamiltonian": lambda: qtn.MPO_ham_heis(5),
    "one site": lambda: qtn.MPO_rand(1, 3, seed=1),
    "one site, cyclic": lambda: qtn.MPO_rand(1, 3, cyclic=True, seed=1),
    "two sites, cyclic": lambda: qtn.MPO_rand(2, 3, cyclic=True, seed=1),
    "a bond is missing": without_a_bond,
    "legs of several sizes": lambda: of_dims((2, 3), (4, 2), (1, 5)),
    "upper and lower swapped": transposed,
    "permuted axes": with_permuted_axes,
    "other names": renamed,
    "an exponent": lambda: with_exponent(2.5),
    "norms kept as exponent": lambda: qtn.MPO_rand(4, 3, seed=1).equalize_norms(1.0),
    "factors of the whole": with_factors,
    "several tensors per site": multiplied_without_contraction,
    "a matrix on a bond": with_a_matrix_on_a_bond,
    "some of the sites": of_some_sites,
    "a bond of 1 around": with_bonds_of_one_around,
    "several dtypes": of_mixed_dtypes,
    "canonical": lambda: qtn.MPO_rand(5, 3, seed=1).canonicalize(2),
    "conjugate": lambda: qtn.MPO_rand(4, 3, seed=1, dtype="complex128").H,
    "negative": lambda: -1 * qtn.MPO_rand(4, 3, seed=1),
    "sum": lambda: qtn.MPO_rand(4, 3, seed=1) + qtn.MPO_rand(4, 2, seed=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_quimb_has_comes_over_as_the_matrix_that_quimb_makes_of_it(name):
    operator = NETWORKS[name]()
    expected = operator.to_dense()
    mpo = interop.from_quimb(operator)
    assert mpo.to_matrix().shape == expected.shape
    np.testing.assert_allclose(mpo.to_matrix(), expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(interop.to_quimb(mpo).to_dense(), mpo.to_matrix(), atol=1e-5)


def test_a_missing_bond_is_one_of_1():
    assert interop.from_quimb(without_a_bond()).bond_dims == (3, 1, 3)


def test_an_index_that_was_cut_off_is_a_leg_of_1():
    operator = qtn.MPO_rand(3, 3, seed=1)
    rest = interop.from_quimb(operator.isel({"b1": 1}))
    assert rest.shape == tn.MPOShape((2, 2, 2), (2, 1, 2))
    expected = operator.to_dense().reshape(8, 2, 2, 2)[:, :, 1].reshape(8, 4)
    np.testing.assert_allclose(rest.to_matrix(), expected, atol=1e-12)


def test_an_exponent_that_only_the_whole_can_hold_is_spread_over_the_cores():
    operator = with_exponent(300.0)
    operator[0].modify(data=operator[0].data * 1e-200)
    mpo = interop.from_quimb(operator)
    assert all(np.isfinite(core).all() for core in mpo.cores)
    expected = with_exponent(0.0).to_dense() * 1e100
    np.testing.assert_allclose(mpo.to_matrix(), expected, rtol=1e-9)


def test_tensors_of_torch_come_over_with_their_gradients():
    operator = qtn.MPO_rand(3, 2, seed=1)
    operator.apply_to_arrays(lambda array: torch.tensor(array, requires_grad=True))
    mpo = interop.from_quimb(operator)
    mpo.norm().backward()
    assert all(tensor.data.grad is not None for tensor in operator)


def with_an_open_index():
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator[1].new_ind("loose", size=2)
    return operator


def with_joined_sites():
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator.contract_between("I1", "I2")
    return operator


def with_a_long_bond():
    operator = qtn.MPO_rand(4, 3, seed=1)
    operator[0].new_ind("long", size=2), operator[2].new_ind("long", size=2)
    return operator


def of_integers():
    operator = qtn.MPO_rand(3, 2, seed=1)
    operator.apply_to_arrays(lambda array: array.astype(int))
    return operator


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda: qtn.MPO_rand(4, bond_dim=2, cyclic=True, seed=0), "is not cyclic"),
        (lambda: qtn.MPS_rand_state(4, 2, seed=0), "expected a MatrixProductOperator .* got a Mat"),
        (lambda: qtn.MPO_rand(3, 2, seed=0)[0], "got a Tensor"),
        (lambda: np.eye(4), "got a ndarray"),
        (with_an_open_index, "index loose of the operator is left open"),
        (with_joined_sites, "a tensor of the operator has legs of several sites"),
        (with_a_long_bond, "bond long joins sites"),
        (of_integers, "floating-point or complex, got dtype int64"),
    ],
)
def test_what_is_no_chain_with_open_ends_is_refused_with_the_reason(operator, message):
    with pytest.raises(tn.InputError, match=message):
        interop.from_quimb(operator())


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
