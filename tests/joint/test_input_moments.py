"""Roots of second moments, of well and badly conditioned ones, against dense algebra."""

import numpy as np
import pytest

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import InputError
from tnmoe.joint.input_moments import InputMoments


def moments_of(size, condition, complex_=False):
    rng = np.random.default_rng(size)
    numbers = rng.normal(size=(size, size)) + 1j * complex_ * rng.normal(size=(size, size))
    basis = np.linalg.qr(numbers if complex_ else numbers.real)[0]
    moments = basis * np.geomspace(1, 1 / condition, size) @ basis.conj().T
    return (moments + moments.conj().T) / 2


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("condition", [1, 1e6, 1e12])
def test_a_root_is_precise_and_so_is_its_inverse(library, condition, complex_):
    moments = moments_of(12, condition, complex_)
    root, inverse = map(to_numpy, InputMoments.of(to_library(moments, library)).root())
    np.testing.assert_allclose(root @ root.conj().T, moments, atol=1e-14)
    # The condition of the root is the square root of that of the moments.
    np.testing.assert_allclose(inverse @ root, np.eye(12), atol=1e-14 * condition**0.5)
    np.testing.assert_allclose(root @ inverse, np.eye(12), atol=1e-14 * condition**0.5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_singular_moments_have_a_root_up_to_rounding(library):
    factor = np.random.default_rng(0).normal(size=(9, 4))
    root, inverse = map(to_numpy, InputMoments.of(to_library(factor @ factor.T, library)).root())
    np.testing.assert_allclose(root @ root.T, factor @ factor.T, atol=1e-12)
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(inverse @ root, np.eye(9), atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_expert_has_its_own_root_and_moments_of_zeros_are_the_identity(library):
    stack = np.stack([moments_of(5, 10), np.zeros((5, 5)), moments_of(5, 1e3)]).astype(np.float32)
    moments = InputMoments.of(to_library(stack, library))
    assert not moments.are_common
    for expert, expected in enumerate([stack[0], np.eye(5), stack[2]]):
        root, _ = map(to_numpy, moments.root(expert))
        assert root.dtype == np.float64
        np.testing.assert_allclose(root @ root.T, expected, atol=1e-12)
        np.testing.assert_allclose(to_numpy(moments.of_expert(expert)), expected)


def test_all_experts_have_the_root_of_common_moments():
    moments = InputMoments.of(moments_of(4, 10))
    assert moments.are_common
    assert moments.root(0) is moments.root(7)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (1, 2, 3, 3)])
def test_moments_that_are_not_square_are_refused(shape):
    with pytest.raises(InputError, match=r"\(in, in\) or \(E, in, in\)"):
        InputMoments.of(np.zeros(shape))


def test_complex_moments_of_real_matrices_are_refused():
    with pytest.raises(InputError, match="moments of real matrices must be real"):
        InputMoments.of(moments_of(4, 10, complex_=True)).check(np.zeros((2, 3, 4)))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("damping", [0.0, 0.25, 1.0])
def test_damping_brings_the_mean_eigenvalue_of_all_experts_to_1(library, damping):
    stack = np.stack([3 * moments_of(5, 10), np.zeros((5, 5)), moments_of(5, 1e3)])
    scale = np.trace(stack, axis1=1, axis2=2).mean() / 5
    moments = InputMoments.of(to_library(stack, library), damping)
    for expert, given in enumerate(stack):
        expected = (1 - damping) * given / scale + damping * np.eye(5)
        found = to_numpy(moments.of_expert(expert))
        np.testing.assert_allclose(found, expected if expected.any() else np.eye(5), atol=1e-14)


def test_damping_makes_no_copy_of_the_moments_of_all_experts():
    stack = np.stack([moments_of(5, 10)] * 3).astype(np.float32)
    assert np.shares_memory(InputMoments.of(stack, 0.1).matrices, stack)
