"""Layers in the hands of torch's distributed wrappers are refused by name, and stay whole."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.nn.editing.layers import make, tokens
from tnmoe import nn
from tnmoe.errors import InputError


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def assert_refused(layer):
    for change in (
        nn.add_experts,
        lambda layer: nn.remove_experts(layer, 0),
        lambda layer: nn.merge_experts(layer, [0, 1]),
        lambda layer: nn.FrozenExperts(torch.optim.SGD(layer.parameters()), layer, 0),
    ):
        with pytest.raises(InputError, match="sharded"):
            change(layer)
    assert layer.router.num_experts == layer.experts.num_experts == 4


@pytest.mark.parametrize("part", ["the layer", "experts", "up"])
def test_layers_of_fully_shard_are_refused(mesh, part):
    layer = make("interleaved; biases", dtype=torch.float32)
    parts = {"the layer": layer, "experts": layer.experts, "up": layer.experts.up}
    fully_shard(parts[part], mesh=mesh)
    assert_refused(layer)


@pytest.mark.parametrize("part", ["experts", "up"])
def test_layers_of_fully_sharded_data_parallel_are_refused(mesh, part):
    layer = make("interleaved; biases", dtype=torch.float32)
    holder = layer if part == "experts" else layer.experts
    wrapped = FullyShardedDataParallel(
        getattr(holder, part), use_orig_params=True, device_id=torch.device("cpu")
    )
    assert wrapped.module is getattr(holder, part)
    assert_refused(layer)


def test_a_model_is_unwrapped_from_data_parallel_and_wrapped_again(mesh):
    layer, x = make("interleaved; biases"), tokens()
    wrapped = DistributedDataParallel(torch.nn.Sequential(layer))
    wrapped(x).sum().backward()
    with pytest.raises(InputError, match="delete the wrapper, change the experts and wrap"):
        nn.add_experts(layer)
    nn.reorder_experts(layer, [3, 2, 1, 0])  # the shapes stay
    wrapped(x).sum().backward()
    del wrapped
    nn.add_experts(layer)
    nn.open_experts(layer)
    again = DistributedDataParallel(torch.nn.Sequential(layer))
    layer.zero_grad()
    again(x).sin().sum().backward()
    found = [each.grad.clone() for each in layer.parameters()]
    layer.zero_grad()
    layer(x).sin().sum().backward()
    for gradient, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
