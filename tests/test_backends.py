"""Backends: what each library must do alike, and the fallbacks when LAPACK fails."""

import numpy as np
import pytest
import torch

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe.backends import available_backends, backend_named, get_backend
from tnmoe.backends.protocol import Backend
from tnmoe.errors import InputError

METHODS = [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("library", available_backends())
def test_a_backend_has_every_operation_of_the_protocol(library):
    backend = backend_named(library)
    assert backend.name == library
    assert all(callable(getattr(backend, name)) for name in METHODS)


def test_subclasses_of_arrays_are_found():
    assert get_backend(torch.nn.Parameter(torch.ones(2))).name == "torch"
    assert get_backend(np.ones(2).view(type("Mine", (np.ndarray,), {}))).name == "numpy"


def test_an_unknown_library_is_named():
    with pytest.raises(InputError, match="'jax'; tnmoe has backends for numpy, torch"):
        backend_named("jax")
    with pytest.raises(TypeError, match=r"one of numpy, torch, got builtins\.dict"):
        get_backend({})


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_norms_of_huge_and_tiny_numbers_neither_overflow_nor_vanish(library, dtype):
    for scale in (1e-30, 1.0, 1e30):
        array = np.array([3 * scale, 4 * scale], dtype)
        norm = to_numpy(get_backend(to_library(array, library)).norm(to_library(array, library)))
        assert norm.dtype == array.real.dtype
        assert float(norm) == pytest.approx(5 * scale, rel=1e-6)


def test_numpy_svd_falls_back_to_qr_iteration(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    matrix = np.random.default_rng(0).standard_normal((2, 5, 3))
    u, s = backend_named("numpy").left_svd(matrix)
    np.testing.assert_allclose(u @ (u.swapaxes(-1, -2) @ matrix), matrix, atol=1e-12)
    np.testing.assert_allclose((s**2).sum(-1), (matrix**2).sum((-1, -2)))


def test_torch_svd_falls_back_to_double_precision(monkeypatch):
    real_svd = torch.linalg.svd

    def fails_in_single(matrix, **kwargs):
        if matrix.dtype == torch.complex64:
            raise torch.linalg.LinAlgError("SVD did not converge")
        return real_svd(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_single)
    matrix = torch.randn(5, 3, dtype=torch.complex64)
    u, s = backend_named("torch").left_svd(matrix)
    assert (u.dtype, s.dtype) == (torch.complex64, torch.float32)
    torch.testing.assert_close(u @ (u.mH @ matrix), matrix)


ILL_POSED = {
    "zero": torch.zeros(4, 3, dtype=torch.float64),
    "identity": torch.eye(4, 3, dtype=torch.float64),
    "rank one": torch.ones(4, 3, dtype=torch.float64),
    "wide zero": torch.zeros(3, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("matrix", ILL_POSED.values(), ids=ILL_POSED.keys())
@pytest.mark.parametrize("name", ["qr", "left_svd", "eigh", "triangle"])
def test_gradients_of_singular_matrices_and_equal_values_are_finite(matrix, name):
    matrix = matrix.clone().requires_grad_()
    argument = matrix @ matrix.mT if name == "eigh" else matrix
    argument = (
        argument.mT if name == "triangle" and argument.shape[0] > argument.shape[1] else argument
    )
    result = getattr(backend_named("torch"), name)(argument)
    sum((part**3).sum() for part in (result if name != "triangle" else [result])).backward()
    assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize("size", [(5, 3), (3, 5), (2, 4, 4), (2, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_basis_independent_functions_agree_with_finite_differences(size, dtype):
    xp = backend_named("torch")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, dtype=dtype, generator=generator, requires_grad=True)
    other = torch.randn(size[-1], 2, dtype=dtype, generator=generator)

    def by_svd(matrix):
        u, s = xp.left_svd(matrix)
        kept = u[..., :2]
        return kept @ (kept.mH @ matrix), s

    def by_eigh(matrix):
        values, vectors = xp.eigh(matrix @ matrix.mH)
        kept = vectors[..., :2]
        return kept @ (kept.mH @ matrix), values

    def by_qr(matrix):
        q, r = xp.qr(matrix)
        return q @ (r @ other), q @ q.mH

    for function in (by_svd, by_eigh, by_qr):
        assert torch.autograd.gradcheck(function, matrix)
