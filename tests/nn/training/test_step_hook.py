"""Steps of optimisers: found behind wrappers, and counted once each."""

import pytest
import torch

import tnmoe as tn
from tests.nn.training.small_layer import loss_of, make_layer, train_step
from tnmoe import nn


class Parent(torch.optim.SGD):
    """An optimiser whose step calls that of its parent, with hooks at every level."""

    def step(self, closure=None, note=None):
        self.note = note
        return super().step(closure)


class Child(Parent):
    """An optimiser that goes on to :class:`Parent`, and may fail."""

    fails = False

    def step(self, closure=None, note=None):
        try:
            super().step(closure, note)
            if self.fails == "inside":
                raise KeyError("inside")
        except KeyError:
            pass
        if self.fails is True:
            raise RuntimeError("lost")


def child_of(layer):
    Parent([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # torch hooks a class when it is used
    return Child(layer.parameters(), lr=0.1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_goes_on_to_its_parents_is_one_step(compiled):
    layer = make_layer()
    optimizer = child_of(layer)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step % 2))
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for number in range(4):
        loss_of(layer, number).backward()
        before = layer.experts.up.center.detach().clone()
        step()
        assert torch.equal(layer.experts.up.center, before) == bool(number % 2)
        assert mask.step == number + 1
        optimizer.zero_grad()


@pytest.mark.parametrize("fails", [True, "inside"])
def test_a_nested_step_that_fails_leaves_the_count_of_the_next_ones_right(fails):
    layer = make_layer()
    optimizer = child_of(layer)
    mask = nn.GradientMask(optimizer, layer, 0.5)
    optimizer.fails = fails
    if fails == "inside":
        optimizer.step()
        assert mask.step == 1
    else:
        with pytest.raises(RuntimeError, match="lost"):
            optimizer.step()
        assert mask.step == 0
    begun = mask.step
    optimizer.fails = False
    for number in range(3):
        train_step(layer, optimizer, number)
        assert mask.step == begun + number + 1


def test_further_arguments_of_a_step_arrive():
    layer = make_layer()
    optimizer = child_of(layer)
    nn.GradientMask(optimizer, layer, 0.5)
    optimizer.step(lambda: loss_of(layer, 0), "hello")
    assert optimizer.note == "hello"


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: holds an optimiser and is one by type alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class HasNoHooks(torch.optim.Optimizer):
    """As torch's PostLocalSGDOptimizer is."""

    def __init__(self, optim):
        self.optim = optim

    def step(self, closure=None):
        return self.optim.step(closure)


@pytest.mark.parametrize("wrap", [Wrapper, HasNoHooks])
def test_an_optimiser_is_found_inside_its_wrappers(wrap):
    layer = make_layer()
    optimizer = Wrapper(wrap(torch.optim.SGD(layer.parameters(), lr=0.1)))
    before = layer.experts.up.center.detach().clone()
    with nn.GradientMask(optimizer, layer, 1.0) as mask:
        loss_of(layer, 0).backward()
        optimizer.step()
    assert torch.equal(layer.experts.up.center, before)
    assert mask.step == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda layer: nn.GradientMask(layer, layer, 0.5),
            "optimizer must be a torch.optim.Optimizer, got MPOMoE; .* AutogradMask",
        ),
        (
            lambda layer: nn.GradientMask(HasNoHooks(None), layer, 0.5),
            "optimizer must be a torch.optim.Optimizer, got HasNoHooks",
        ),
    ],
)
def test_what_is_no_optimiser_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make(make_layer())
