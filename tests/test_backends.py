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
    matrix = np.random.default_rng(0).standard_normal((5, 3))
    u, s, vh = backend_named("numpy").svd(matrix)
    np.testing.assert_allclose((u * s) @ vh, matrix, atol=1e-12)


def test_torch_svd_falls_back_to_double_precision(monkeypatch):
    real_svd = torch.linalg.svd

    def fails_in_single(matrix, **kwargs):
        if matrix.dtype == torch.complex64:
            raise torch.linalg.LinAlgError("SVD did not converge")
        return real_svd(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_single)
    matrix = torch.randn(5, 3, dtype=torch.complex64)
    u, s, vh = backend_named("torch").svd(matrix)
    assert (u.dtype, s.dtype, vh.dtype) == (torch.complex64, torch.float32, torch.complex64)
    torch.testing.assert_close((u * s) @ vh, matrix)
