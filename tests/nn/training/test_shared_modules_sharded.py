"""Layers around shared modules train alike in one process and in two, whatever is sharded."""

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.nn.ranks import on_two_ranks
from tests.nn.training.test_shared_modules import make
from tnmoe import InputError, nn

KINDS = ("hidden", "residual, end shared")
# Of every way to distribute a model, the modules that make units of their own.
UNITS = {
    "the model": (),
    "experts": (nn.MPOExperts,),
    "projections": (nn.HiddenProjection, nn.ResidualProjection),
    "modules": (torch.nn.Linear,),
}
CHANGES = ("nothing", "scale", "mask", "frozen")


def inputs(rank):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))


def model_of(kind):
    return torch.nn.Sequential(make(kind))


def sharded(kind, way, units):
    model = model_of(kind)
    if way == "DDP":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if way == "FSDP2":
        for module in reversed(list(model.modules())):
            if isinstance(module, UNITS[units]):
                fully_shard(module)
        return fully_shard(model)
    policy = ModuleWrapPolicy(UNITS[units]) if UNITS[units] else None
    return FullyShardedDataParallel(
        model,
        use_orig_params=way == "FSDP",
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
    )


def train(model, change, losses):
    if change == "frozen":
        nn.freeze_shared(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hooks = []
    if change == "scale":
        hooks.append(nn.SharedGradientScale(model, 0.5))
    if change == "mask":
        hooks.append(nn.GradientMask(optimizer, model, 1.0))
    for _ in range(2):
        optimizer.zero_grad()
        losses(model).backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()


def full_parameters(model, way):
    if way != "FSDP":
        return {
            name.removeprefix("module."): getattr(each, "full_tensor", lambda each=each: each)()
            .detach()
            .clone()
            for name, each in model.named_parameters()
        }
    with FullyShardedDataParallel.summon_full_params(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): each.detach().clone()
            for name, each in model.named_parameters()
        }


def cases():
    for kind in KINDS:
        for way in ("DDP", "FSDP", "FSDP2"):
            for units in UNITS if way != "DDP" else ("the model",):
                yield kind, way, units


def run_rank(rank):
    found = {}
    for kind, way, units in cases():
        for change in CHANGES:
            model = sharded(kind, way, units)
            train(model, change, lambda model: model(inputs(rank)).square().sum())
            found[kind, way, units, change] = full_parameters(model, way)
    messages = {}
    for kind in KINDS:
        for units in UNITS:
            model = sharded(kind, "flat", units)
            for call in (nn.shared_parameters, nn.freeze_shared, nn.SharedGradientScale):
                try:
                    call(model)
                    messages[kind, units] = ""
                except InputError as error:
                    messages[kind, units] = str(error)
    return found, messages


@pytest.fixture(scope="module")
def ranks():
    return on_two_ranks(run_rank)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way", "units"), list(cases()))
def test_two_processes_train_as_one(kind, way, units, ranks):
    for change in CHANGES:
        model = model_of(kind)
        train(
            model,
            change,
            lambda model: sum(model(inputs(rank)).square().sum() for rank in (0, 1)) / 2,
        )
        for found, _ in ranks:
            mine = found[kind, way, units, change]
            for name, expected in model.named_parameters():
                torch.testing.assert_close(mine[name], expected, msg=f"{change}: {name}")


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_inside_a_flat_parameter_is_refused_with_what_to_do(kind, units, ranks):
    for _, messages in ranks:
        assert "use_orig_params=True, or fully_shard" in messages[kind, units]
