"""A layer that is called again computes with what its modules hold then."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn as torch_nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from tests.nn.layouts import H, from_linear, loop, make, routed, vary
from tnmoe.nn.projection import Projection

KINDS = ["hidden", "residual", "residual, end shared", "ends shared"]


def chains(experts):
    """The projections that store cores."""
    return [module for module in experts.modules() if hasattr(module, "set_core")]


def replace_cores(experts):
    for chain in chains(experts):
        core = chain.aux_0
        chain.aux_0 = torch_nn.Parameter(core.detach() + 1)


def swap_memory(experts):
    for parameter in experts.parameters():
        parameter.data = parameter.data + 1


def write_in_place(experts):
    for parameter in experts.parameters():
        parameter.data.add_(1)


def load_and_assign(experts):
    state = {name: value + 1 for name, value in experts.state_dict().items()}
    experts.load_state_dict(state, assign=True)


def replace_shared_modules(experts):
    for module in experts.modules():
        if isinstance(getattr(module, "base", None), torch_nn.Linear):
            module.base = vary(copy.deepcopy(module.base))


def replace_projections(experts):
    experts.up, experts.down = (vary(copy.deepcopy(each)) for each in (experts.up, experts.down))


def give_biases(experts):
    for projection in (experts.up, experts.down):
        projection.set_bias(torch.full((projection.out_features,), 0.5).double())


def take_biases(experts):
    for projection in (experts.up, experts.down):
        projection.bias = None


def replace_activation(experts):
    experts.activation = torch_nn.Tanh()


def parametrize(experts):
    class Shifted(torch_nn.Module):
        def forward(self, core):
            return core + 1

    for chain in chains(experts):
        register_parametrization(chain, "aux_0", Shifted())


def prune_cores(experts):
    for chain in chains(experts):
        prune.random_unstructured(chain, "aux_0", 0.5)


CHANGES = [
    replace_cores, swap_memory, write_in_place, load_and_assign, replace_shared_modules,
    replace_projections, give_biases, take_biases, replace_activation, parametrize, prune_cores,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_change_between_two_calls_counts(kind, change, tokens):
    given = routed(tokens=tokens)
    experts = from_linear(kind) if kind.startswith(("hidden", "residual")) else make(kind)
    torch.testing.assert_close(experts(*given), loop(experts, *given))
    change(experts)
    for _ in range(2):
        torch.testing.assert_close(experts(*given), loop(experts, *given))
    # A parametrized core is another tensor in every call.
    write_in_place(experts)
    torch.testing.assert_close(experts(*given), loop(experts, *given))


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_inference_has_all_gradients(kind):
    experts, given = make(kind), routed()
    with torch.no_grad():
        experts(*given)
    experts(*given).square().sum().backward()
    for _ in range(2):
        assert all(parameter.grad is not None for parameter in experts.parameters())
        first = [parameter.grad.clone() for parameter in experts.parameters()]
        experts.zero_grad()
        experts(*given).square().sum().backward()
        for parameter, grad in zip(experts.parameters(), first, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_come_between_two_calls_run(kind):
    experts, given, seen = make(kind), routed(), []
    expected = experts(*given)
    projections = [each for each in experts.modules() if isinstance(each, Projection)]
    handles = [
        each.register_forward_hook(lambda module, *_: seen.append(module)) for each in projections
    ]
    torch.testing.assert_close(experts(*given), expected)
    assert {*seen} == {*projections}
    for handle in handles:
        handle.remove()
    seen.clear()
    torch.testing.assert_close(experts(*given), expected)
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_other_parameters_for_one_call_count_in_this_call_only(kind):
    experts, given = make(kind), routed()
    expected = experts(*given)
    other = vary(copy.deepcopy(experts))
    found = functional_call(experts, dict(other.named_parameters()), given)
    torch.testing.assert_close(found, loop(other, *given))
    torch.testing.assert_close(experts(*given), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_moved_layer_have_cores_of_their_own(kind):
    experts, given = make(kind), routed()
    expected = experts(*given)
    copied = copy.deepcopy(experts)
    write_in_place(experts)
    torch.testing.assert_close(copied(*given), expected)
    assert not torch.allclose(experts(*given), expected)
    single = copied.float()(*(each.float() if each.is_floating_point() else each for each in given))
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-4)
    assert copied.hidden_size == H


def test_layers_that_nobody_holds_are_freed():
    experts = make("hidden")
    with torch.no_grad():
        experts(*routed())
    references = [weakref.ref(experts), weakref.ref(experts.up.base)]
    del experts
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_a_layer_gives_up_are_freed(kind):
    for give_up in (lambda experts: experts.to("meta"), add_hooks_and_replace):
        experts, given = make(kind), routed()
        experts(*given)
        references = [weakref.ref(parameter) for parameter in experts.parameters()]
        give_up(experts)
        if not next(experts.parameters()).is_meta:
            experts(*given)
        gc.collect()
        assert not any(reference() is not None for reference in references)


def add_hooks_and_replace(experts):
    load_and_assign(experts)
    for projection in (experts.up, experts.down):
        projection.register_forward_hook(lambda *_: None)
