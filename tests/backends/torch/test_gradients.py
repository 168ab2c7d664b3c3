"""Gradients of decompositions are finite, and right where they are defined."""

import pytest
import torch

from tnmoe.backends import backend_named

ILL_POSED = {
    "zero": torch.zeros(4, 3, dtype=torch.float64),
    "identity": torch.eye(4, 3, dtype=torch.float64),
    "rank one": torch.ones(4, 3, dtype=torch.float64),
    "wide zero": torch.zeros(3, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("matrix", ILL_POSED.values(), ids=ILL_POSED.keys())
@pytest.mark.parametrize("name", ["qr", "left_svd", "eigh", "triangular_factor"])
def test_gradients_of_singular_matrices_and_equal_values_are_finite(matrix, name):
    matrix = matrix.clone().requires_grad_()
    argument = matrix @ matrix.mT if name == "eigh" else matrix
    argument = (
        argument.mT
        if name == "triangular_factor" and argument.shape[0] > argument.shape[1]
        else argument
    )
    result = getattr(backend_named("torch"), name)(argument)
    sum(
        (part**3).sum() for part in (result if name != "triangular_factor" else [result])
    ).backward()
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
