"""Gradients through operations on whole operators agree with finite differences."""

import pytest
import torch
from torch.autograd.functional import hvp

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
    "compress": lambda a, b: (a + b).compress(max_bond=3, center_site=1).to_matrix(),
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


SQUARE = tn.MPOShape((2, 4, 2), (2, 4, 2))
MATRIX, DIRECTION, WEIGHTS = torch.randn(
    3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)


def weighed(mpo):
    return (mpo.to_matrix() * WEIGHTS).sum()


FUNCTIONS = {
    "decompose by svd": lambda m: weighed(tn.decompose(m, SQUARE, max_bond=3)),
    "decompose by eigh": lambda m: weighed(tn.decompose(m, SQUARE, max_bond=3, method="eigh")),
    "compress": lambda m: weighed(tn.decompose(m, SQUARE).compress(max_bond=3)),
    "product": lambda m: weighed(tn.matmul(*[tn.decompose(m, SQUARE)] * 2, max_bond=3)),
    "fit": lambda m: weighed(tn.fit(tn.decompose(m, SQUARE), max_bond=3, max_sweeps=3)),
    "Schmidt values": lambda m: tn.decompose(m, SQUARE).schmidt_values(0).sum(),
    "norm": lambda m: tn.decompose(m, SQUARE).norm(),
    "apply": lambda m: tn.decompose(m, SQUARE).apply(WEIGHTS).pow(2).sum(),
}


def gradient(function, matrix):
    matrix = matrix.clone().requires_grad_()
    function(matrix).backward()
    return matrix.grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_agree_with_finite_differences_in_every_mode(name):
    function, step = FUNCTIONS[name], 1e-5
    expected = gradient(function, MATRIX + step * DIRECTION)
    expected = (expected - gradient(function, MATRIX - step * DIRECTION)) / (2 * step)
    twice = {
        "backward twice": hvp(function, MATRIX, DIRECTION)[1],
        "torch.func.vjp": torch.func.vjp(torch.func.grad(function), MATRIX)[1](DIRECTION)[0],
        "forward over reverse": torch.func.jvp(torch.func.grad(function), (MATRIX,), (DIRECTION,))[
            1
        ],
    }
    for result in twice.values():
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformations_of_torch_func_give_the_same_derivatives(name):
    function, expected = FUNCTIONS[name], gradient(FUNCTIONS[name], MATRIX)
    torch.testing.assert_close(torch.func.grad(function)(MATRIX), expected)
    forward = torch.func.jvp(function, (MATRIX,), (DIRECTION,))[1]
    torch.testing.assert_close(forward, (expected * DIRECTION).sum())


def test_a_second_derivative_that_is_not_known_is_refused_and_the_first_is_right():
    """Of a chain whose bonds are larger than its rank."""
    one = tn.decompose(MATRIX, SQUARE)
    cores = [core.clone().requires_grad_() for core in (one + one).cores]
    value = weighed(tn.MPO(cores, SQUARE).compress(max_bond=3))
    plain = torch.autograd.grad(value, cores, retain_graph=True)
    recorded = torch.autograd.grad(value, cores, create_graph=True)
    for each, other in zip(recorded, plain, strict=True):
        torch.testing.assert_close(each, other)
    with pytest.raises(tn.InputError, match=r"second derivatives .* need unfoldings of full rank"):
        sum(each.sum() for each in recorded).backward()


def test_vmap_is_refused_with_what_to_do_instead():
    with pytest.raises(tn.InputError, match=r"torch\.func\.vmap hides .* tnmoe\.decompose_batch"):
        torch.func.vmap(FUNCTIONS["decompose by svd"])(torch.stack([MATRIX, WEIGHTS]))
