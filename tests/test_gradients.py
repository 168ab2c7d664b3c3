"""Gradients through operations on whole operators agree with finite differences."""

import pytest
import torch

import tnmoe as tn

SHAPE = tn.MPOShape((2, 2, 2), (2, 2, 2), 7, 7)
FIRST = tn.MPO.random(SHAPE, 2, 0, torch.zeros((), dtype=torch.float64))
SECOND = tn.MPO.random(SHAPE, 2, 1, torch.zeros((), dtype=torch.float64))


def vidal(a, b):
    """Γ and λ depend on a choice of signs; the operator they make does not."""
    gammas, values = a.vidal()
    first, *others = gammas
    cores = [value.reshape(-1, 1, 1, 1) * core for value, core in zip(values, others, strict=True)]
    return (tn.MPO([first, *cores], SHAPE).to_matrix(), *values)


OPERATIONS = {
    "sum, direct": lambda a, b: tn.add([a, b], max_bond=2).to_matrix(),
    "sum, successive": lambda a, b: tn.add([a, b, a], method="successive", max_bond=3).to_matrix(),
    "sum, randomized": lambda a, b: tn.add([a, b], method="randomized", max_bond=2).to_matrix(),
    "product, direct": lambda a, b: tn.matmul(a, b, max_bond=2).to_matrix(),
    "product, zip-up": lambda a, b: tn.matmul(a, b, method="zipup", max_bond=2).to_matrix(),
    "product, randomized": lambda a, b: tn.matmul(
        a, b, method="randomized", max_bond=2
    ).to_matrix(),
    "fit": lambda a, b: tn.fit([a, b], initial=a, max_sweeps=2, tol=0).to_matrix(),
    "kron": lambda a, b: tn.kron(a, tn.MPO(b.cores)).to_matrix(),
    "canonicalize": lambda a, b: a.canonicalize(2).canonicalize(0).to_matrix(),
    "norms": lambda a, b: (a.norm(), (a - b).norm(), a.canonicalize(1).norm()),
    "Schmidt values": lambda a, b: (a.schmidt_values(0)[:2], (a @ b).schmidt_values(1)),
    "Vidal form": vidal,
    "compress": lambda a, b: (a + b).compress(max_bond=3, center=1).to_matrix(),
    "apply, exactly and in batches": lambda a, b: (
        a.apply(b.to_matrix()[0]),
        a.apply(b.to_matrix()),
        a.apply(b.to_matrix()[:, None]),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_agree_with_finite_differences(name):
    cores = [core.clone().requires_grad_() for core in (*FIRST.cores, *SECOND.cores)]
    count = SHAPE.sites

    def operation(*cores):
        return OPERATIONS[name](tn.MPO(cores[:count], SHAPE), tn.MPO(cores[count:], SHAPE))

    assert torch.autograd.gradcheck(operation, cores)


@pytest.mark.parametrize("scheme", ["direct", "successive", "randomized"])
@pytest.mark.parametrize("operator", [tn.MPO.identity, tn.MPO.zeros])
def test_gradients_of_roundings_are_finite_for_zero_and_for_equal_schmidt_values(operator, scheme):
    square = tn.MPOShape((2, 2, 2), (2, 2, 2))
    one = operator(square, torch.zeros((), dtype=torch.float64))
    cores = [core.clone().requires_grad_() for core in one.cores]
    mpo = tn.MPO(cores, square)
    total = tn.add([mpo, mpo], method=scheme, max_bond=2)
    product = tn.matmul(mpo, mpo, max_bond=2)
    (total.to_matrix().sum() + product.to_matrix().sum() + (total @ mpo).trace()).backward()
    assert all(torch.isfinite(core.grad).all() for core in cores)
