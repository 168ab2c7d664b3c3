"""Derivatives of decompositions in JAX are finite, and right where they are defined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import tnmoe as tn
from tnmoe.backends import backend_named

ILL_POSED = {
    "zero": np.zeros((4, 3)),
    "identity": np.eye(4, 3),
    "rank one": np.ones((4, 3)),
    "wide zero": np.zeros((3, 4)),
}


@pytest.mark.parametrize("matrix", ILL_POSED.values(), ids=ILL_POSED.keys())
@pytest.mark.parametrize("name", ["qr", "left_svd", "eigh", "triangular_factor"])
def test_gradients_of_singular_matrices_and_equal_values_are_finite(matrix, name):
    def function(matrix):
        argument = matrix @ matrix.T if name == "eigh" else matrix
        if name == "triangular_factor" and matrix.shape[0] > matrix.shape[1]:
            argument = matrix.T
        result = getattr(backend_named("jax"), name)(argument)
        return sum((part**3).sum() for part in (result if isinstance(result, tuple) else [result]))

    assert np.isfinite(jax.jit(jax.grad(function))(jnp.array(matrix))).all()


def by_svd(matrix):
    u, s = backend_named("jax").left_svd(matrix)
    kept = u[..., :2]
    return kept @ (kept.conj().mT @ matrix), s


def by_eigh(matrix):
    values, vectors = backend_named("jax").eigh(matrix @ matrix.conj().mT)
    kept = vectors[..., :2]
    return kept @ (kept.conj().mT @ matrix), values


def by_qr(matrix):
    q, r = backend_named("jax").qr(matrix)
    return q @ r[..., :2], q @ q.conj().mT


def by_triangular_factor(matrix):
    wide = matrix if matrix.shape[-2] < matrix.shape[-1] else matrix.mT
    factor = backend_named("jax").triangular_factor(wide)
    return factor @ factor.conj().mT


@pytest.mark.parametrize(("size", "dtype"), [((5, 3), "float64"), ((3, 5), "complex128")])
@pytest.mark.parametrize("function", [by_svd, by_eigh, by_qr, by_triangular_factor])
def test_derivatives_of_both_modes_agree_with_finite_differences(function, size, dtype):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(size)
    if dtype == "complex128":
        matrix = matrix + 1j * rng.standard_normal(size)
    check_grads(jax.jit(function), (jnp.array(matrix),), order=1, atol=1e-4, rtol=1e-4)


SHAPE = tn.MPOShape((2, 4, 2), (2, 4, 2))
MATRIX, WEIGHTS = np.random.default_rng(0).standard_normal((2, 16, 16))
FUNCTIONS = {
    "decompose": lambda m: tn.decompose(m, SHAPE, bonds=(3, 3)).to_matrix(),
    "decompose by eigh": lambda m: tn.decompose(m, SHAPE, bonds=(3, 3), method="eigh").to_matrix(),
    "compress": lambda m: tn.decompose(m, SHAPE).compress(bonds=(3, 3)).to_matrix(),
    "product": lambda m: tn.matmul(*[tn.decompose(m, SHAPE)] * 2, bonds=(3, 3)).to_matrix(),
    "zip-up": lambda m: tn.matmul(
        *[tn.decompose(m, SHAPE, max_bond=2)] * 2, bonds=(3, 3), method="zipup"
    ).to_matrix(),
    "randomized sum": lambda m: tn.add(
        [tn.decompose(m, SHAPE, max_bond=3)] * 2, bonds=(3, 3), method="randomized"
    ).to_matrix(),
    "apply": lambda m: tn.decompose(m, SHAPE, max_bond=3).apply(m),
    "norm": lambda m: (tn.decompose(m, SHAPE) @ tn.decompose(m, SHAPE)).norm() * m,
    "Schmidt values": lambda m: tn.decompose(m, SHAPE).schmidt_values(0).sum() * m,
}
_QUICK = {"decompose", "compress", "apply"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each not in _QUICK)) for each in FUNCTIONS],
)
def test_gradients_of_operations_are_those_of_torch(name):
    def loss(matrix, weights):
        return (FUNCTIONS[name](matrix) * weights).sum()

    tensor = torch.tensor(MATRIX, requires_grad=True)
    loss(tensor, torch.tensor(WEIGHTS)).backward()
    found = jax.jit(jax.grad(loss))(jnp.array(MATRIX), jnp.array(WEIGHTS))
    np.testing.assert_allclose(found, tensor.grad, rtol=1e-8, atol=1e-8 * np.abs(found).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decompose", "compress"])
def test_second_derivatives_forward_over_reverse_agree_with_finite_differences(name):
    """The order of jax.hessian."""
    gradient = jax.jit(jax.grad(lambda matrix: (FUNCTIONS[name](matrix) * WEIGHTS).sum()))
    matrix, direction, step = jnp.array(MATRIX), jnp.array(WEIGHTS), 1e-5
    found = jax.jvp(gradient, (matrix,), (direction,))[1]
    ahead, behind = gradient(matrix + step * direction), gradient(matrix - step * direction)
    expected = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


MATRICES = {
    "gaussian": MATRIX,
    # The swap of the outer sites: four equal Schmidt values at both bonds.
    "equal Schmidt values": np.eye(16).reshape(2, 4, 2, 16).transpose(2, 1, 0, 3).reshape(16, 16),
    "rank one": np.outer(MATRIX[0], MATRIX[1]),
    "identity": np.eye(16),
    "zero": np.zeros((16, 16)),
}
DECOMPOSED = {
    "by svd": lambda m: tn.decompose(m, SHAPE, method="svd"),
    "by eigh": lambda m: tn.decompose(m, SHAPE, method="eigh"),
}
CHANGED = {
    "compressed": lambda m: tn.decompose(m, SHAPE).compress(bonds=SHAPE.bond_dims()),
    "in canonical form": lambda m: tn.decompose(m, SHAPE).canonicalize(2).canonicalize(0),
}


def weighted_sum(operation):
    return lambda matrix: (operation(matrix).to_matrix() * WEIGHTS).sum()


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        *((kind, operation) for kind in MATRICES for operation in DECOMPOSED.values()),
        *(("gaussian", operation) for operation in CHANGED.values()),
        ("equal Schmidt values", CHANGED["in canonical form"]),
    ],
)
def test_the_derivative_of_what_keeps_the_matrix_is_the_identity(kind, operation):
    """Also where Schmidt values are equal, and for decompositions where they are zero."""
    found = jax.jit(jax.grad(weighted_sum(operation)))(jnp.array(MATRICES[kind]))
    np.testing.assert_allclose(found, WEIGHTS, atol=1e-6)


@pytest.mark.parametrize("kind", [*MATRICES][1:])
@pytest.mark.parametrize("way", CHANGED)
def test_gradients_of_gauges_of_singular_matrices_and_equal_values_are_finite(kind, way):
    """Bonds larger than ranks have isometries with arbitrary columns: no derivative is defined."""
    found = jax.jit(jax.grad(weighted_sum(CHANGED[way])))(jnp.array(MATRICES[kind]))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_in_single_precision_bear_numbers_whose_squares_over_or_underflow(scale):
    def loss(matrix):
        return (FUNCTIONS["decompose"](matrix) * WEIGHTS.astype("float32")).sum()

    expected = jax.grad(loss)(jnp.array(MATRIX, "float32"))
    found = jax.jit(jax.grad(loss))(jnp.array(MATRIX * scale, "float32"))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_the_gradient_of_a_norm_is_the_direction_and_zero_at_zero(scale):
    matrix = jnp.array(MATRIX * scale, "float32")
    found = jax.jit(jax.grad(lambda m: tn.decompose(m, SHAPE).norm()))(matrix)
    expected = MATRIX / np.linalg.norm(MATRIX) * (scale > 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_second_derivatives_that_are_not_known_are_nan():
    """Of a chain whose bonds are larger than its rank."""

    def loss(matrix):
        one = tn.decompose(matrix, SHAPE, bonds=(3, 3))
        return ((one + one).compress(bonds=(3, 3)).to_matrix() * WEIGHTS).sum()

    matrix, direction = jnp.array(MATRIX), (jnp.array(WEIGHTS),)
    gradient, change = jax.jvp(jax.grad(loss), (matrix,), direction)
    assert np.isfinite(gradient).all()
    assert np.isnan(change).any()
