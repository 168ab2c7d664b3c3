"""Checkpoints of spread experts: other numbers of ranks read the same bits."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from tests.nn.parallel.training import LAYOUTS, STEPS, model_of, spread, train, whole
from tests.nn.ranks import on_ranks

pytestmark = pytest.mark.slow

# Ranks, and the sizes of a mesh with the dimensions dp and ep.
SAVED = ("residual", "interleaved")
MESHES = ((1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (4, (1, 4)), (1, (1, 1)))


def on_a_mesh(shape, layout):
    model = model_of(layout)
    wrapped = spread(model, init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep")))
    return model, wrapped


def numbers(model, optimizer):
    """Return all numbers of a model and its optimiser, and which tensors are spread."""
    states, of_optimizer = get_state_dict(model, optimizer)
    return (
        {name: whole(each) for name, each in states.items()},
        {
            (name, key): whole(each)
            for name, entries in of_optimizer["state"].items()
            for key, each in entries.items()
        },
    )


def save(rank, folder, shape, layouts=SAVED):
    found = {}
    for layout in layouts:
        model, wrapped = on_a_mesh(shape, layout)
        rows = [4] * (shape[0] * shape[1])
        optimizer = train(model, wrapped, [rank], rows, steps=2)["optimizer"]
        write(model, optimizer, folder / layout)
        found[layout] = numbers(model, optimizer)
    return found


def load(rank, source, target, shape):
    found = {}
    for layout in SAVED:
        model, _ = on_a_mesh(shape, layout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        read(model, optimizer, source / layout)
        write(model, optimizer, target / layout)
        found[layout] = numbers(model, optimizer)
    return found


def write(model, optimizer, folder):
    states, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": states, "optimizer": of_optimizer}, checkpoint_id=folder)


def read(model, optimizer, folder):
    states, of_optimizer = get_state_dict(model, optimizer)
    found = {"model": states, "optimizer": of_optimizer}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )


def test_a_checkpoint_goes_over_other_ranks_and_back_to_the_same_bits(tmp_path):
    (expected,) = on_ranks(1, partial(save, folder=tmp_path / "0", shape=(1, 1)))
    for step, (ranks, shape) in enumerate(MESHES[1:]):
        source, target = tmp_path / f"{step}", tmp_path / f"{step + 1}"
        for found in on_ranks(ranks, partial(load, source=source, target=target, shape=shape)):
            for layout in SAVED:
                for own, given in zip(found[layout], expected[layout], strict=True):
                    assert own.keys() == given.keys()
                    assert all(torch.equal(own[name], given[name]) for name in given)


def interrupt(rank, folder):
    rows, found = [5, 4], {}
    for layout in LAYOUTS:
        model, wrapped = on_a_mesh((1, 2), layout)
        whole_run = train(model, wrapped, [rank], rows)
        model, wrapped = on_a_mesh((1, 2), layout)
        optimizer = train(model, wrapped, [rank], rows, steps=2)["optimizer"]
        write(model, optimizer, folder / layout)
        model, wrapped = on_a_mesh((1, 2), layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        read(model, optimizer, folder / layout)
        rest = train(
            model, wrapped, [rank], rows, steps=STEPS - 2, first=2, state=optimizer.state_dict()
        )
        found[layout] = whole_run["parameters"], rest["parameters"]
    return found


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_without_interruption(tmp_path):
    for found in on_ranks(2, partial(interrupt, folder=tmp_path)):
        for layout, (expected, resumed) in found.items():
            for name, each in expected.items():
                assert torch.equal(each, resumed[name]), (layout, name)


def load_other_sizes(rank, folder):
    model = model_of("residual", max_bond=2)
    spread(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep")))
    before = {name: whole(each) for name, each in model.named_parameters()}
    states = model.state_dict()
    try:
        dcp.load({"model": states}, checkpoint_id=folder)
    except CheckpointException as error:
        after = {name: whole(each) for name, each in model.named_parameters()}
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return None


def test_a_checkpoint_of_other_sizes_is_refused_and_changes_nothing(tmp_path):
    on_ranks(2, partial(save, folder=tmp_path, shape=(1, 2), layouts=["residual"]))
    for message, is_unchanged in on_ranks(
        2, partial(load_other_sizes, folder=tmp_path / "residual")
    ):
        assert "1.experts.up.delta" in message
        assert "size" in message.lower()
        assert is_unchanged
