"""Schmidt decompositions and mutual information, against dense algebra and quimb."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import LIBRARIES, dense_norm, libraries, shapes, to_library, to_numpy
from tests.operators import SHAPE, a_mpo, dense, dtypes, random_mpo, scaled, seeds

EPSILON = {"float32": 1e-5, "complex64": 1e-5, "float64": 1e-12, "complex128": 1e-12}


def tensor_of(mpo):
    """The whole chain as a tensor with one axis per site, for both legs together."""
    whole = dense(tn.MPO(mpo.cores))
    shape, sites = mpo.shape, mpo.shape.sites
    axes = [axis for site in range(sites) for axis in (site, sites + site)]
    return whole.reshape(*shape.out_dims, *shape.in_dims).transpose(axes).reshape(shape.legs)


def sum_of(parts, count=None):
    terms = zip(to_numpy(parts.values)[:count], parts.left, parts.right, strict=False)
    return sum(value * np.kron(dense(left), dense(right)) for value, left, right in terms)


several_sites = shapes(max_size=900).filter(lambda shape: shape.sites > 1)


@settings(max_examples=40)
@given(several_sites, dtypes, libraries, seeds, st.data())
def test_the_terms_of_a_schmidt_decomposition_sum_up_to_the_operator(
    shape, dtype, library, seed, data
):
    bond = data.draw(st.integers(0, shape.sites - 2))
    mpo = random_mpo(shape, dtype, library, seed, data.draw(st.integers(1, 6)))
    parts = tn.operator_schmidt(mpo, bond)
    whole = dense(tn.MPO(mpo.cores))
    slack = EPSILON[dtype] * dense_norm(whole)
    assert dense_norm(sum_of(parts) - whole) <= 10 * slack
    expected = to_numpy(mpo.schmidt_values(bond))
    values = to_numpy(parts.values)
    np.testing.assert_allclose(values, expected[: len(values)], atol=10 * slack)
    assert all(expected[len(values) :] <= slack)
    assert {one.dtype for one in (*parts.left, *parts.right)} == {mpo.dtype}


@settings(max_examples=40)
@given(several_sites, dtypes, libraries, seeds, st.floats(0, 12), st.data())
def test_both_families_are_orthonormal_whatever_the_schmidt_values(
    shape, dtype, library, seed, decades, data
):
    """Also those of the smallest values, by which nobody may divide."""
    bond = data.draw(st.integers(0, shape.sites - 2))
    a, b = (random_mpo(shape, dtype, library, seed + k, 2) for k in range(2))
    parts = tn.operator_schmidt(a + 10**-decades * b, bond)
    for family, center_site in ((parts.left, bond), (parts.right, 0)):
        gram = [[complex(one.inner(other)) for other in family] for one in family]
        np.testing.assert_allclose(gram, np.eye(len(family)), atol=100 * EPSILON[dtype])
        assert {one.center_site for one in family} == {center_site}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_count_leaves_the_discarded_weight_as_the_error(library):
    mpo = random_mpo(SHAPE, "float64", library, 0, 5)
    for bond in range(3):
        for count in (1, 3, 100):
            parts = tn.operator_schmidt(mpo, bond, count=count)
            assert len(parts.left) == len(parts.right) == parts.values.shape[0] <= count
            error = dense_norm(sum_of(parts) - dense(mpo))
            assert error == pytest.approx(parts.discarded, abs=1e-12 * dense_norm(dense(mpo)))


def test_the_zero_operator_has_one_term_with_the_value_zero():
    parts = tn.operator_schmidt(tn.MPO.zeros(SHAPE), 1)
    assert parts.values.tolist() == [0.0]
    assert parts.discarded == 0
    assert float(parts.left[0].norm()) == float(parts.right[0].norm()) == 1


def test_half_precision_is_kept():
    mpo = random_mpo(SHAPE, "float16", "numpy", 0, 2)
    parts = tn.operator_schmidt(mpo, 1)
    assert parts.left[0].dtype == np.float16
    assert dense_norm(sum_of(parts) - dense(mpo)) <= 1e-2 * dense_norm(dense(mpo))


def dense_entropy(tensor, group):
    rest = [site for site in range(tensor.ndim) if site not in group]
    size = np.prod([tensor.shape[site] for site in group], dtype=int)
    matrix = tensor.transpose([*group, *rest]).reshape(size, -1)
    p = np.linalg.svd(matrix / np.linalg.norm(matrix), compute_uv=False) ** 2
    p = p[p > 0]
    return -(p * np.log(p)).sum()


@settings(max_examples=40)
@given(several_sites, dtypes, libraries, seeds, st.data())
def test_mutual_information_is_that_of_the_dense_state(shape, dtype, library, seed, data):
    mpo = random_mpo(shape, dtype, library, seed, data.draw(st.integers(1, 6)))
    # Every site belongs to the first group, to the second or to neither.
    places = data.draw(st.permutations([0, 1, *(data.draw(st.integers(0, 2)) for _ in range(6))]))
    groups = [[site for site in range(shape.sites) if places[site] == k] for k in range(2)]
    if not all(groups):
        groups = [[0], [shape.sites - 1]]
    tensor = tensor_of(mpo)
    a, b, both = (dense_entropy(tensor, group) for group in (*groups, [*groups[0], *groups[1]]))
    found = tn.mutual_information(mpo, *groups)
    assert found == pytest.approx(max(0.0, a + b - both), abs=1e-5)
    assert found == pytest.approx(tn.mutual_information(mpo, groups[1], groups[0]), abs=1e-12)


@pytest.mark.parametrize("groups", [(0, 1), (0, 3), (3, 1), ((0, 2), (1, 3)), ((0, 1), (2, 3))])
def test_quimb_finds_the_same_mutual_information(groups):
    quimb = pytest.importorskip("quimb")
    mpo = tn.MPO.random(tn.MPOShape((2, 1, 3, 2), (1, 2, 1, 2)), 3, rng=0)
    state = tensor_of(mpo).reshape(-1, 1)
    listed = [[group] if isinstance(group, int) else list(group) for group in groups]
    kept = sorted([*listed[0], *listed[1]])
    density = quimb.ptr(quimb.normalize(quimb.qu(state)), mpo.shape.legs, kept)
    # quimb numbers the sites that the partial trace left, and counts in bits.
    bits = quimb.mutinf(
        density,
        [mpo.shape.legs[site] for site in kept],
        [kept.index(site) for site in listed[0]],
    )
    assert tn.mutual_information(mpo, *groups) == pytest.approx(bits * np.log(2), abs=1e-8)


def test_across_a_bond_mutual_information_is_twice_the_entropy():
    mpo = random_mpo(SHAPE, "complex128", "numpy", 0, 5)
    for bond in range(3):
        found = tn.mutual_information(mpo, range(bond + 1), range(bond + 1, 4))
        assert found == pytest.approx(2 * mpo.entropy(bond))


def test_distant_sites_of_a_long_chain_are_reached():
    """Sites 0 and 59 are always in the same of two states, all others are products."""
    ends = np.eye(2)
    middle = np.einsum("ab,oi->aoib", np.eye(2), np.ones((2, 2)))
    cores = [ends.reshape(1, 2, 1, 2), *([middle] * 58), ends.reshape(2, 2, 1, 1)]
    mpo = tn.MPO([core * 1e-9 for core in cores])
    assert tn.mutual_information(mpo, 0, 59) == pytest.approx(2 * np.log(2))
    assert tn.mutual_information(mpo, 0, 30) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e150])
def test_mutual_information_does_not_depend_on_the_size_of_the_operator(scale):
    mpo = random_mpo(SHAPE, "float64", "numpy", 0, 3)
    expected = tn.mutual_information(mpo, 0, 2)
    assert tn.mutual_information(scaled(mpo, scale), 0, 2) == pytest.approx(expected)


def test_the_zero_operator_has_no_mutual_information():
    assert tn.mutual_information(tn.MPO.zeros(SHAPE), 0, (1, 3)) == 0


ONE_SITE = tn.MPO([np.ones((1, 2, 2, 1))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.operator_schmidt(a_mpo(), 3), "bond must be an integer from 0 to 2, got 3"),
        (lambda: tn.operator_schmidt(ONE_SITE, 0), "bond must lie between two sites"),
        (lambda: tn.operator_schmidt(a_mpo(), 0, count=0), "count must be a positive integer"),
        (
            lambda: tn.operator_schmidt(scaled(a_mpo(), np.nan), 0),
            "the cores of an operator contain NaN",
        ),
        (lambda: tn.mutual_information(a_mpo(), 0, 4), "every site of second must be an integer"),
        (lambda: tn.mutual_information(a_mpo(), (), 1), "first must name at least one site"),
        (lambda: tn.mutual_information(a_mpo(), (0, 0), 1), r"none twice, got \[0, 0\]"),
        (lambda: tn.mutual_information(a_mpo(), (0, 1), (2, 1)), r"no site in common, got \[1\]"),
        (lambda: tn.mutual_information(a_mpo(), "01", 2), "every site of first"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()


def test_both_libraries_agree():
    mpos = [random_mpo(SHAPE, "float64", library, 3, 4) for library in LIBRARIES]
    found = [tn.mutual_information(mpo, 1, 3) for mpo in mpos]
    np.testing.assert_allclose(found, found[0])
    values = [to_numpy(tn.operator_schmidt(mpo, 1).values) for mpo in mpos]
    np.testing.assert_allclose(values, [values[0]] * len(values))
    assert type(tn.operator_schmidt(mpos[1], 1).values) is type(to_library(np.zeros(()), "torch"))
