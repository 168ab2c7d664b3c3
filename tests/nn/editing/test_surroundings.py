"""What lives around a layer sees its experts change: caches, copies, states, compiled code."""

import copy
import io

import pytest
import torch

from tests.nn.editing.layers import make, tokens
from tests.nn.layouts import set_route
from tnmoe import nn
from tnmoe.errors import InputError


def change(layer):
    nn.add_experts(layer, 2, like=[1, 2], noise=0.5, rng=0)
    nn.open_experts(layer)
    nn.reorder_experts(layer, [5, 1, 2, 0, 4, 3])
    nn.remove_experts(layer, 1)


@pytest.mark.parametrize("route", ["cached", "joint", "rebuilt", "per_expert"])
@pytest.mark.parametrize("kind", ["interleaved; biases", "residual", "split", "hidden"])
def test_nothing_that_was_kept_of_the_old_experts_is_used(kind, route):
    layer, x = make(kind).eval(), tokens()
    set_route(layer.experts, route)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        for one in (layer, fresh):
            change(one)
        expected = fresh(x)
        for _ in range(2):
            assert torch.equal(layer(x), expected)
        nn.reorder_experts(layer, [4, 3, 2, 1, 0])
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["residual; biases", "hidden; biases", "interleaved; biases"])
def test_a_layer_that_shrank_takes_the_biases_of_single_experts(kind):
    layer, x = make(kind).eval(), tokens()
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        layer(x)
        for one in (layer, fresh):
            nn.remove_experts(one, 2)
        assert torch.equal(layer(x), fresh(x))


def test_kept_matrices_of_old_experts_are_dropped():
    layer, x = make("interleaved").eval(), tokens()
    set_route(layer.experts, "cached")
    before = nn.weight_cache.used
    with torch.no_grad():
        layer(x)
    assert nn.weight_cache.used > before
    nn.reorder_experts(layer, [3, 2, 1, 0])
    assert nn.weight_cache.used <= before


@pytest.mark.parametrize("kind", ["interleaved; biases", "low rank", "residual; gated", "hidden"])
def test_a_state_loads_into_a_layer_that_was_made_with_as_many_experts(kind):
    layer, x = make(kind), tokens()
    nn.add_experts(layer, 2)
    nn.remove_experts(layer, 0)
    other = make(kind)
    nn.add_experts(other, 2, like=[3, 3] if kind == "low rank" else None)
    nn.remove_experts(other, 0)
    if kind == "low rank":  # ranks are no part of a state
        other = copy.deepcopy(layer)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(kind).load_state_dict(layer.state_dict())


def test_copies_and_pickles_of_a_changed_layer_are_like_it():
    layer, x = make("interleaved; biases"), tokens()
    change(layer)
    nn.close_experts(layer, 0)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        nn.add_experts(other)
        assert layer.router.num_experts == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["interleaved; biases", "residual", "hidden"])
def test_compiled_layers_follow(kind):
    layer, x = make(kind), tokens()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x).sum().backward()
    layer.zero_grad()
    for step in (change, lambda layer: nn.close_experts(layer, [1, 2])):
        step(layer)
        found = compiled(x)
        torch.testing.assert_close(found, layer(x))
    found.square().sum().backward()
    assert layer.router.weight.grad.shape == layer.router.weight.shape
    torch.compiler.reset()


def test_changes_in_inference_mode_leave_a_layer_trainable():
    layer = make("interleaved; biases")
    with torch.inference_mode():
        nn.add_experts(layer, 1)
        nn.merge_experts(layer, [0, 1])
        nn.open_experts(layer)
    layer(tokens()).sum().backward()
    assert all(each.grad is not None for each in layer.parameters())


def test_a_layer_without_numbers_is_named():
    layer = make("interleaved; biases").to("meta")
    with pytest.raises(InputError, match="the layer is on the meta device: load its numbers first"):
        nn.add_experts(layer, 2)


def test_a_mixture_with_a_shared_expert_keeps_it():
    base, x = make("stacked"), tokens()
    shared = torch.nn.Linear(x.shape[1], x.shape[1], dtype=x.dtype)
    layer = nn.MPOMoE(base.router, base.experts, shared, shared_gate=True)
    expected = layer(x)
    nn.add_experts(layer, 2)
    assert torch.equal(layer(x), expected)


def test_sharded_parameters_are_named():
    class Sharded(torch.nn.Parameter):
        pass

    layer = make("stacked")
    layer.experts.up.stacked = Sharded(layer.experts.up.stacked.detach())
    with pytest.raises(InputError, match=r"experts.up.stacked is a Sharded: edit the layer before"):
        nn.add_experts(layer)


def test_routing_is_recorded_across_a_change():
    layer, x = make("stacked"), tokens()
    with nn.record_routing(layer) as routing:
        layer(x)
        change(layer)
        layer(x)
    assert [len(call.slots_per_expert()) for call in routing.calls] == [4, 5]
    assert routing.balance_loss().isfinite()


def test_sharded_modules_are_named():
    layer = make("stacked")
    layer.experts.up._is_fsdp_managed_module = True  # as FullyShardedDataParallel marks it
    with pytest.raises(InputError, match=r"experts\.up is sharded or offloaded"):
        nn.remove_experts(layer, 0)
