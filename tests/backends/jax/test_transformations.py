"""Operators inside jax.jit, jax.vmap and jax.grad: the same results, or an error that helps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tnmoe as tn

SHAPE = tn.MPOShape((2, 3, 2), (2, 3, 2), 11, 11)
FIRST, SECOND = (
    jnp.array(matrix) for matrix in np.random.default_rng(0).standard_normal((2, 11, 11))
)


def mpo_of(matrix):
    return tn.decompose(matrix, SHAPE)


COMPILED = {
    "decompose": lambda m: tn.decompose(m, SHAPE, max_bond=2).to_matrix(),
    "decompose within a number of parameters": lambda m: tn.decompose(
        m, SHAPE, bonds=(2, 2), max_params=100
    ).to_matrix(),
    "a batch": lambda m: tn.decompose_batch(jnp.stack([m, 2 * m]), SHAPE, max_bond=2)[
        1
    ].to_matrix(),
    "compress": lambda m: mpo_of(m).compress(max_bond=3, center_site=0).to_matrix(),
    "sums and products": lambda m: (mpo_of(m) @ mpo_of(m).T + 3 * mpo_of(m)).to_matrix(),
    "rounded sum": lambda m: tn.add([mpo_of(m)] * 3, method="successive", bonds=(2, 2)).to_matrix(),
    "rounded product": lambda m: tn.matmul(mpo_of(m), mpo_of(m), max_bond=3).to_matrix(),
    "randomized product": lambda m: tn.matmul(
        mpo_of(m), mpo_of(m), method="randomized", max_bond=3
    ).to_matrix(),
    "rounded entrywise product": lambda m: tn.hadamard(
        mpo_of(m), mpo_of(m), method="zipup", max_bond=3
    ).to_matrix(),
    "numbers": lambda m: (mpo_of(m).norm(), mpo_of(m).trace(), mpo_of(m).inner(mpo_of(m))),
    "norm without a centre": lambda m: (mpo_of(m) + mpo_of(m)).norm(),
    "Schmidt values": lambda m: mpo_of(m).schmidt_values(1),
    "entries": lambda m: (mpo_of(m)[1], mpo_of(m)[:, 2], mpo_of(m)[[0, 1], [1, 2]]),
    "experts": lambda m: tn.SharedMPO.replicate(mpo_of(m), 2).apply(m[None]),
}


_QUICK = {"decompose", "compress", "numbers", "entries", "experts"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each not in _QUICK)) for each in COMPILED],
)
def test_compiled_and_vectorised_results_are_those_without(name):
    function = COMPILED[name]
    expected = function(FIRST)
    found = jax.jit(jax.vmap(function))(jnp.stack([SECOND, FIRST]))
    for each, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(each[1], other, atol=1e-10)


@pytest.mark.parametrize("name", ["norm without a centre", "randomized product", "compress"])
def test_a_derivative_is_that_of_the_compiled_function(name):
    """Outside of jax.jit some cores are tracers, and others hold numbers."""

    def loss(matrix):
        return (COMPILED[name](matrix) ** 2).sum()

    found, expected = jax.grad(loss)(FIRST), jax.jit(jax.grad(loss))(FIRST)
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())


def test_gradients_keep_single_precision_beside_double():
    matrix = jnp.array(FIRST + 1j * SECOND, "complex64")
    gradient = jax.grad(lambda m: tn.decompose(m, SHAPE).compress(bonds=(2, 2)).norm())(matrix)
    assert gradient.dtype == "complex64"


REFUSED = {
    "a tolerance": (lambda m: tn.decompose(m, SHAPE, rtol=0.1), "tolerances.* give bonds"),
    "a number of parameters": (lambda m: tn.decompose(m, SHAPE, max_params=60), "give bonds"),
    "weights": (lambda m: tn.decompose(m, SHAPE, max_bond=2, weights=m @ m.T), "give bonds"),
    "exact ranks": (lambda m: mpo_of(m).compress(), "exact rank .* jax hides .* give bonds"),
    "the Vidal form": (lambda m: mpo_of(m).vidal(), "exact rank .* jax hides"),
    "a fit": (lambda m: tn.fit(mpo_of(m), max_bond=2), "measured errors"),
    "an entropy": (lambda m: mpo_of(m).entropy(0), "hide the numbers"),
    "a NumPy array": (lambda m: np.asarray(mpo_of(m)), "outside of the transformed function"),
}


@pytest.mark.parametrize("transformation", [jax.jit, jax.grad])
@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_by_numbers_is_refused_with_what_to_do(name, transformation):
    function, message = REFUSED[name]
    with pytest.raises(tn.InputError, match=message):
        transformation(function)(FIRST)


def test_what_was_cut_is_unknown_while_a_function_is_traced():
    info = []

    def function(matrix):
        _, found = tn.decompose(matrix, SHAPE, max_bond=2, return_info=True)
        info.append(found)
        return found.spectra

    _, expected = tn.decompose(FIRST, SHAPE, max_bond=2, return_info=True)
    for found, values in zip(jax.jit(function)(FIRST), expected.spectra, strict=True):
        np.testing.assert_allclose(found, values, atol=1e-10)
    assert np.isnan(info[0].error_bound)
    assert np.isfinite(expected.error_bound)


def test_operators_from_outside_keep_their_numbers_inside():
    mpo = mpo_of(FIRST)
    rounded = tn.add([mpo, mpo], rtol=0.3)

    @jax.jit
    def function(matrix):
        found = tn.add([mpo, mpo], rtol=0.3)
        assert found.bond_dims == rounded.bond_dims
        return (mpo + mpo).norm() * matrix, (mpo_of(matrix) @ found).to_matrix()

    scaled, product = function(SECOND)
    np.testing.assert_allclose(scaled, (mpo + mpo).norm() * SECOND)
    np.testing.assert_allclose(product, SECOND @ rounded.to_matrix(), atol=1e-10)


HOSTILE = {
    "NaN": (np.where(FIRST > 2, np.nan, FIRST), "float64", np.nan),
    "zero": (np.zeros((11, 11)), "float32", 0.0),
    "tiny": (FIRST * 1e-30, "float32", 1e-6),
    "huge": (FIRST * 1e30, "float32", 1e-6),
    "complex": (FIRST + 1j * SECOND, "complex64", 1e-6),
    "half precision": (FIRST, "float16", 1e-3),
    "brain floats": (FIRST, "bfloat16", 1e-2),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_matrices_survive_compilation_and_nan_stays_nan(kind):
    matrix, dtype, error = HOSTILE[kind]
    matrix = jnp.array(matrix, dtype)

    @jax.jit
    def function(matrix):
        mpo = tn.decompose(matrix, SHAPE)
        rounded = (mpo + mpo).compress(bonds=SHAPE.bond_dims())
        return rounded.to_matrix(), rounded.norm()

    found, norm = function(matrix)
    assert found.dtype == matrix.dtype
    assert norm.dtype == matrix.real.dtype
    exact = 2 * np.asarray(matrix).astype(complex)
    if np.isnan(error):
        assert np.isnan(found).all()
        assert np.isnan(norm)
        with pytest.raises(tn.InputError, match="contains NaN or infinity"):
            tn.decompose(matrix, SHAPE)
        return
    size = np.linalg.norm(exact)
    assert np.linalg.norm(np.asarray(found).astype(complex) - exact) <= 4 * error * size
    assert float(norm) == pytest.approx(size, rel=4 * error)
