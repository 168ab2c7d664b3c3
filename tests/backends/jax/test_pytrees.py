"""Operators are pytrees: JAX's functions take, return and map over them as over arrays."""

import subprocess
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tnmoe as tn
import tnmoe.backends.jax  # registers operators

SHAPE = tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 12)
LIKE = jnp.zeros(())
MPO = tn.MPO.random(SHAPE, 3, rng=0, like=LIKE)
X = jnp.array(np.random.default_rng(1).standard_normal((5, 12)))


def test_operators_go_into_compiled_functions_and_come_out():
    product = jax.jit(lambda mpo, x: mpo @ x)(MPO, X[0])
    np.testing.assert_allclose(product, MPO.to_matrix() @ X[0])
    twice = jax.jit(lambda mpo: 2 * mpo)(MPO)
    assert isinstance(twice, tn.MPO)
    assert twice.shape == SHAPE
    np.testing.assert_allclose(twice.to_matrix(), 2 * MPO.to_matrix())


def test_cores_of_numpy_become_those_of_jax():
    mpo = tn.MPO.random(SHAPE, 3, rng=0)
    doubled = jax.jit(lambda mpo: mpo + mpo)(mpo)
    assert isinstance(doubled.cores[0], jax.Array)
    np.testing.assert_allclose(doubled.to_matrix(), 2 * mpo.to_matrix())
    back = jax.tree.map(np.asarray, doubled)
    assert isinstance(back.to_matrix(), np.ndarray)


def test_a_gradient_is_an_operator_with_the_same_cores():
    def loss(mpo):
        return ((mpo.apply(X) - 1) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(MPO)
    step, rng = 1e-6, np.random.default_rng(2)
    direction = jax.tree.map(lambda core: rng.standard_normal(core.shape), MPO)
    slope = sum((g * d).sum() for g, d in zip(gradient.cores, direction.cores, strict=True))
    ahead = loss(jax.tree.map(lambda core, d: core + step * d, MPO, direction))
    behind = loss(jax.tree.map(lambda core, d: core - step * d, MPO, direction))
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)


def test_an_operator_with_changed_cores_has_no_known_centre():
    """Its norm would otherwise be that of one core."""
    mpo = MPO.canonicalize(1)
    changed = jax.tree.map(lambda core: core + 1, mpo)
    assert changed.center_site is None
    np.testing.assert_allclose(changed.norm(), np.linalg.norm(_chain(changed)))


def _chain(mpo):
    """The matrix with its padding, whose norm that of an operator is."""
    return tn.MPO(mpo.cores).to_matrix()


def test_vmap_maps_over_operators_with_stacked_cores():
    mpos = [tn.MPO.random(SHAPE, 3, rng=seed, like=LIKE) for seed in range(3)]
    stacked = jax.tree.map(lambda *cores: jnp.stack(cores), *mpos)
    assert stacked.bond_dims == MPO.bond_dims
    results = jax.vmap(lambda mpo: mpo.apply(X))(stacked)
    for mpo, result in zip(mpos, results, strict=True):
        np.testing.assert_allclose(result, mpo.apply(X), atol=1e-10)
    for use in (lambda: stacked.to_matrix(), lambda: stacked @ X[0], lambda: stacked + stacked):
        with pytest.raises(tn.InputError, match=r"jax\.vmap, or take one .* jax\.tree\.map"):
            use()
    first = jax.tree.map(lambda core: core[0], stacked)
    np.testing.assert_allclose(first.to_matrix(), mpos[0].to_matrix())


@pytest.mark.parametrize("base", [None, MPO])
def test_experts_are_pytrees_and_one_compiled_function_applies_them_all(base):
    shared = tn.SharedMPO.replicate(MPO, 4, noise=0.5, rng=0)
    shared = tn.SharedMPO(shared.cores, SHAPE, shared.center_site, base)
    slots = jnp.array(np.random.default_rng(3).standard_normal((4, 5, 12)))
    expected = np.einsum("eoi,eni->eno", shared.to_matrices(), slots)
    np.testing.assert_allclose(jax.jit(lambda s, x: s.apply(x))(shared, slots), expected)
    gradient = jax.jit(jax.grad(lambda s: (s.apply(slots) ** 2).sum()))(shared)
    dense = jax.grad(lambda s: (jnp.einsum("eoi,eni->eno", s.to_matrices(), slots) ** 2).sum())(
        shared
    )
    assert isinstance(gradient, tn.SharedMPO)
    assert gradient.center_site == shared.center_site
    for each, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(each, other, atol=1e-8)


def test_stacked_mixtures_are_refused_outside_of_vmap():
    shared = tn.SharedMPO.replicate(MPO, 4)
    stacked = jax.tree.map(lambda core: jnp.stack([core, 2 * core]), shared)
    results = jax.vmap(lambda s: s.apply(X[None]))(stacked)
    np.testing.assert_allclose(results[0], shared.apply(X[None]), atol=1e-10)
    for use in (stacked.to_matrices, lambda: stacked.apply(X[None])):
        with pytest.raises(tn.InputError, match=r"inside jax\.vmap"):
            use()


def test_leaves_have_names_and_may_be_anything():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(MPO)]
    assert paths == [".cores[0]", ".cores[1]", ".cores[2]"]
    shapes = jax.tree.map(jnp.shape, MPO)
    assert all(left[-1] == right[0] for left, right in pairwise(shapes.cores))
    assert "cores" in repr(shapes)
    assert jax.tree.structure(MPO) == jax.tree.structure(MPO.canonicalize(0))


def test_nothing_imports_jax_before_a_user_does():
    code = "import sys, tnmoe, tnmoe.backends; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
