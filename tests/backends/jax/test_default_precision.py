"""In JAX's default, where arrays of float64 do not exist, operators are as precise as elsewhere."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tnmoe as tn
from tnmoe.backends import backend_named

SHAPE = tn.MPOShape((2, 4, 2), (2, 4, 2))
MATRIX = np.random.default_rng(0).standard_normal((16, 16))


@pytest.fixture(autouse=True)
def jax_default():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def matrix():
    """Of Schmidt values down to 1e-7 of the largest, whose squares float32 cannot tell from 0."""
    q, _ = np.linalg.qr(MATRIX)
    unfolded = q * 10.0 ** -np.linspace(0, 7, 16)
    return unfolded.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16)


def test_numbers_of_numpy_become_single_precision_as_in_jax_itself():
    assert backend_named("jax").from_numpy(MATRIX).dtype == jnp.array(MATRIX).dtype == "float32"


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_truncation_keeps_a_tolerance_with_the_bonds_of_numpy(matrix, rtol):
    expected = tn.decompose(matrix.astype("float32"), SHAPE, rtol=rtol)
    mpo, info = tn.decompose(jnp.array(matrix), SHAPE, rtol=rtol, return_info=True)
    error = np.linalg.norm(np.asarray(mpo).astype(float) - matrix.astype("float32"))
    assert mpo.dtype == "float32"
    assert mpo.bond_dims == expected.bond_dims
    assert error <= (rtol + 1e-6) * np.linalg.norm(matrix)
    assert info.spectra[0].dtype == "float64"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_huge_and_tiny_operators_are_right(scale):
    mpo = tn.MPO.random(SHAPE, 3, rng=0, like=jnp.zeros(()))
    scaled = tn.MPO([core * scale ** (1 / 3) for core in mpo.cores])
    assert float(scaled.norm()) == pytest.approx(float(mpo.norm()) * scale, rel=1e-5)


OPERATIONS = {
    "decompose": lambda m: tn.decompose(m, SHAPE, max_bond=3).to_matrix(),
    "compress": lambda m: tn.decompose(m, SHAPE).compress(max_bond=3).to_matrix(),
    "norm": lambda m: tn.decompose(m, SHAPE).compress(bonds=(3, 3)).norm(),
    "randomized": lambda m: tn.add(
        [tn.decompose(m, SHAPE)] * 2, method="randomized", max_bond=3
    ).to_matrix(),
    "apply": lambda m: tn.decompose(m, SHAPE, max_bond=3).apply(m),
    "experts": lambda m: tn.SharedMPO.replicate(tn.decompose(m, SHAPE), 2).apply(m[None]),
}


@pytest.mark.parametrize(
    "name",
    ["decompose", *(pytest.param(each, marks=pytest.mark.slow) for each in [*OPERATIONS][1:])],
)
def test_compiled_functions_and_gradients_stay_in_single_precision(name):
    """The derivative runs after the function, where no block of tnmoe is in force."""
    function, matrix = OPERATIONS[name], jnp.array(MATRIX)
    value = jax.jit(function)(matrix)
    gradient = jax.grad(jax.jit(lambda m: (function(m) ** 2).sum()))(matrix)
    assert value.dtype == gradient.dtype == "float32"
    with jax.enable_x64(True):
        exact = jnp.array(MATRIX)
        expected = jax.jit(jax.value_and_grad(lambda m: (function(m) ** 2).sum()))(exact)
    np.testing.assert_allclose((value**2).sum(), expected[0], rtol=1e-4)
    scale = np.abs(expected[1]).max()
    np.testing.assert_allclose(gradient, expected[1], atol=1e-3 * scale)


def test_products_are_as_precise_as_their_dtype_although_jax_rounds_them():
    xp, array = backend_named("jax"), jnp.array(MATRIX)
    with jax.default_matmul_precision("bfloat16"), xp.full_precision(array):
        traced = str(jax.make_jaxpr(lambda a: a @ a)(array))
    assert "HIGHEST" in traced


def test_other_threads_keep_their_settings():
    inside, done, seen = threading.Event(), threading.Event(), []

    def elsewhere():
        inside.wait()
        seen.append(jax.config.jax_enable_x64)
        done.set()

    before = jax.config.jax_enable_x64
    thread = threading.Thread(target=elsewhere)
    thread.start()
    with backend_named("jax").full_precision(jnp.zeros(())):
        assert jax.config.jax_enable_x64
        inside.set()
        done.wait()
    thread.join()
    assert jax.config.jax_enable_x64 is before is False
    assert seen == [True]  # what this process was started with


def test_double_precision_is_refused_where_jax_has_none():
    with pytest.raises(TypeError, match="jax_enable_x64"):
        backend_named("jax").astype(jnp.zeros(()), "float64")


def test_files_of_double_precision_say_what_to_do(tmp_path):
    tn.save(tmp_path / "mpo", tn.MPO.random(SHAPE, 2, rng=0))
    with pytest.raises(tn.InputError, match=r"float64.*jax.*jax_enable_x64"):
        tn.load(tmp_path / "mpo", library="jax")
