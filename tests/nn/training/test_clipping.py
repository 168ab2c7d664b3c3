"""Clipping without ranks is torch's clipping; tests of ranks are in tests/nn/parallel."""

import pytest
import torch

import tnmoe as tn
from tnmoe import nn


def gradients(scale):
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((3, 4), (5,), (2, 2))]
    for parameter in parameters[:2]:  # the last one has no gradient
        parameter.grad = scale * torch.randn(parameter.shape, generator=draw)
    return parameters


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_norm_and_gradients_are_those_of_torch(scale, norm_type):
    found, expected = gradients(scale), gradients(scale)
    norm = nn.clip_grad_norm_(found, 1.0, norm_type)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(expected, 1.0, norm_type))
    for one, other in zip(found, expected, strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad, other.grad)


def test_one_tensor_and_tensors_without_gradients_are_taken():
    (first, *_), alone = gradients(10.0), torch.nn.Parameter(torch.zeros(2))
    nn.clip_grad_norm_(first, 1.0)
    assert float(first.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    assert nn.clip_grad_norm_([alone], 1.0) == 0


def test_a_norm_that_is_not_finite_is_an_error_on_request():
    parameters = gradients(1.0)
    parameters[0].grad[0, 0] = float("nan")
    before = parameters[1].grad.clone()
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        nn.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert torch.equal(parameters[1].grad, before)
    assert nn.clip_grad_norm_(parameters, 1.0).isnan()


@pytest.mark.parametrize("most", [-1.0, float("nan"), "1"])
def test_a_limit_that_is_no_limit_is_refused(most):
    with pytest.raises(tn.InputError, match="max_norm must be"):
        nn.clip_grad_norm_(gradients(1.0), most)
