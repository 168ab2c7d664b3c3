"""The linear module that experts share is called as it stands: hooked, wrapped, replaced."""

import copy

import peft
import pytest
import torch
from torch import nn as torch_nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.nn.layouts import (
    LAYOUTS,
    E,
    F,
    H,
    assert_all_close,
    assert_is_the_loop,
    call,
    from_linear,
    loop,
    make,
    results,
    routed,
    set_route,
)
from tnmoe import nn
from tnmoe.nn.adapters import warn_of_unsaved
from tnmoe.nn.linear import is_transposed

KINDS = ["hidden", "hidden, ragged groups", "residual", "residual, end shared"]
PARTS = ("up", "gate", "down")


def bases(experts):
    return [getattr(experts, name).base for name in PARTS]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_module_fire_once_per_call_with_a_row_for_every_token(kind, top_k, gradients):
    experts, given, rows = from_linear(kind, gated=True), routed(top_k=top_k), []
    for base in bases(experts):
        base.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        base.register_forward_hook(lambda module, given, output: 2 * output)
        base.register_full_backward_hook(lambda module, *_: rows.append("backward"))
    with torch.set_grad_enabled(gradients):
        output = experts(*given)
    assert rows == [len(given[0])] * 3
    twice = from_linear(kind, gated=True)
    with torch.no_grad():
        for base in bases(twice):
            # The bias of down's module counts as often as the weights of a token say.
            base.weight *= 2
            base.bias *= 2
    weights = given[2].sum(1, keepdim=True) - 1
    doubled = weights * bases(twice)[2].bias / 2
    torch.testing.assert_close(output + doubled, loop(twice, *given))
    if gradients:
        output.sum().backward()
        assert rows[3:] == ["backward"] * 3


@pytest.mark.parametrize("where", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_projection_fire_and_change_what_it_returns(kind, where):
    experts, given, fired = from_linear(kind, gated=True), routed(), []

    def hook(module, given, output):
        fired.append(module)
        return -output

    getattr(experts, where).register_forward_hook(hook)
    output = results(call, experts, given)
    assert fired == [getattr(experts, where)]
    other = from_linear(kind, gated=True)
    with torch.no_grad():
        projection = getattr(other, where)
        projection.base.weight *= -1
        projection.base.bias *= -1
        if projection.bias is not None:
            projection.bias *= -1
        if kind.startswith("residual"):
            projection.delta.core_at(1).mul_(-1)
    assert_all_close(output[:3], results(loop, other, given)[:3])


class Wrapper(torch_nn.Module):
    """Wraps a module without passing its attributes on."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *given):
        self.calls += 1
        return self.inner(*given)


@pytest.mark.parametrize("kind", [*KINDS, "ends shared"])
def test_a_wrapper_of_a_projection_is_called(kind):
    experts, given = from_linear(kind, gated=True), routed()
    expected = results(loop, experts, given)
    set_route(experts, "joint" if kind == "ends shared" else None)
    for name in PARTS:
        setattr(experts, name, Wrapper(getattr(experts, name)))
    assert_all_close(results(call, experts, given), expected)
    assert [getattr(experts, name).calls for name in PARTS] == [1, 1, 1]


class Quantised(torch_nn.Module):
    """A linear module without floating-point weights, as bitsandbytes has them."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.scale = float(linear.weight.detach().abs().max()) / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch_nn.Parameter(weight, requires_grad=False)
        self.bias, self.rows = linear.bias, []

    def forward(self, x):
        self.rows.append(len(x))
        return functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_module_is_called_and_its_matrix_is_never_built(kind):
    experts, given = from_linear(kind, gated=True), routed()
    for name in PARTS:
        projection = getattr(experts, name)
        projection.base = Quantised(projection.base)
    assert_is_the_loop(experts, given)
    for base in bases(experts):
        base.rows.clear()
    experts(*given)
    with torch.no_grad():
        experts(*given)
    experts.eval().train()
    experts.plan(4, 2)
    assert [base.rows for base in bases(experts)] == [[9, 9]] * 3
    twin = copy.deepcopy(experts)
    twin.load_state_dict(experts.state_dict())
    torch.testing.assert_close(twin(*given), experts(*given))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_conv1d_is_used_as_it_stands(kind, bias):
    def conv(columns, rows, bias, dtype):
        module = Conv1D(rows, columns).to(dtype)
        torch_nn.init.normal_(module.bias)
        return module

    experts = from_linear(kind, gated=True, common_bias=bias, linear=conv)
    assert all(is_transposed(base) for base in bases(experts))
    for route in (None, "joint", "rebuilt"):
        assert_is_the_loop(set_route(experts, route), routed())
    if kind.startswith("hidden"):
        center = experts.up.center
        assert center.untyped_storage().data_ptr() == experts.up.base.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_shared_modules_trains_and_nothing_warns_that_it_is_lost(kind, recwarn):
    layer = nn.MPOMoE(nn.TopKRouter(H, E, 2).double(), from_linear(kind, gated=True))
    model = torch_nn.Sequential(layer)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["base"], init_lora_weights=False)
    ).double()
    experts, given = layer.experts, routed()
    assert all(isinstance(base, peft.tuners.lora.Linear) for base in bases(experts))
    assert_is_the_loop(experts, given)
    calls = []
    for base in bases(experts):
        base.register_forward_hook(lambda module, given, _: calls.append(len(given[0])))
    experts(*given)
    assert calls == [len(given[0])] * 3
    shared = {id(each) for each in nn.shared_parameters(tuned)}
    adapters = {name: each for name, each in tuned.named_parameters() if "lora_" in name}
    assert shared >= {id(each) for each in adapters.values()}
    warn_of_unsaved(tuned)
    assert not [each for each in recwarn if "PEFT does not save" in str(each.message)]
    experts.up.base.base_layer.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="does not save the trained parameters of experts"):
        warn_of_unsaved(tuned)


def test_original_modules_behind_trained_copies_are_not_shared_parameters():
    layer = nn.MPOMoE(nn.TopKRouter(H, E, 2).double(), from_linear("residual", gated=True))
    model = torch_nn.Sequential(layer, torch_nn.Linear(H, H))
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["1"], modules_to_save=["base"])
    ).double()
    shared = {id(each) for each in nn.shared_parameters(tuned)}
    names = {name for name, each in tuned.named_parameters() if id(each) in shared}
    assert len(names) == 3
    assert all("modules_to_save" in name for name in names)
    assert_is_the_loop(layer.experts, routed())


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_module_is_the_one_that_is_used(kind):
    experts = from_linear(kind, gated=True)
    for name, size in (("up", (H, F)), ("gate", (H, F)), ("down", (F, H))):
        getattr(experts, name).base = torch_nn.Linear(*size, bias=name == "up").double()
    for route in (None, "joint", "rebuilt", "per_expert"):
        assert_is_the_loop(set_route(experts, route), routed())


def test_only_layouts_with_a_module_have_a_base():
    for kind in LAYOUTS:
        experts = make(kind)
        assert hasattr(experts.up, "base") == (kind.startswith(("hidden", "residual", "only up")))
