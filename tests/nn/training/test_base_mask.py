"""Masks: draws, states and statistics are functions of seed and step."""

import copy
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.nn.training.small_layer import loss_of, make_layer, train_step
from tnmoe import nn


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("per_layer", [False, True])
def test_frequency_of_masked_steps_is_the_probability(probability, per_layer):
    model = torch.nn.ModuleList(make_layer() for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, model, probability, seed=3, per_layer=per_layer)
    steps = 4000
    drawn = [mask.masks(step) for step in range(steps)]
    deviation = (probability * (1 - probability) / steps) ** 0.5
    for name in mask.updates:
        share = sum(draw[name] for draw in drawn) / steps
        assert abs(share - probability) < 4 * deviation
    other = nn.GradientMask(optimizer, model, probability, seed=4, per_layer=per_layer)
    assert [other.masks(step) for step in range(200)] != drawn[:200]
    # Tensors of a layer go together; layers do, or are independent.
    names = [f"{layer}.experts.{side}.center" for layer in (0, 1) for side in ("up", "down")]
    assert all(draw[names[0]] == draw[names[1]] for draw in drawn)
    both = sum(draw[names[0]] and draw[names[2]] for draw in drawn) / steps
    expected = probability**2 if per_layer else probability
    assert abs(both - expected) < 4 * (expected * (1 - expected) / steps) ** 0.5


def test_draws_depend_on_seed_and_step_alone_and_resume_from_a_state_dict():
    def run(steps, state=None):
        layer = make_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        mask = nn.GradientMask(optimizer, layer, 0.5, seed=12 if state else 11)
        if state:
            mask.load_state_dict(state)
        draws = []
        for step in steps:
            before = layer.experts.up.center.detach().clone()
            train_step(layer, optimizer, step)
            draws.append(bool((before == layer.experts.up.center).all()))
        return draws, mask

    whole, mask = run(range(20))
    assert whole == [all(mask.masks(step).values()) for step in range(20)]
    assert 0 < sum(whole) == mask.masked_steps < 20
    assert set(mask.updates.values()) == {20 - mask.masked_steps}
    first, interrupted = run(range(8))
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    rest, resumed = run(range(8, 20), state=torch.load(file, weights_only=True))
    assert first + rest == whole
    assert resumed.state_dict() == mask.state_dict()


def test_a_state_brings_its_probability_and_is_not_changed_by_going_on():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mask = nn.GradientMask(optimizer, layer, 0.5, seed=np.int64(3))
    state = nn.GradientMask(optimizer, layer, np.float32(0.25), seed=4).state_dict()
    mask.load_state_dict(state)
    assert (mask.probability, mask.seed) == (0.25, 4)
    assert json.loads(json.dumps(state)) == state
    before = copy.deepcopy(state)
    mask._finish_step(lambda _: True)
    assert state == before


def test_another_process_draws_the_same():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, 0.5, seed=7, per_layer=True)
    code = (
        "import torch; from tnmoe import nn\n"
        "torch.manual_seed(99); torch.rand(5)\n"
        "layer = nn.MPOMoE(nn.TopKRouter(8, 2), nn.MPOExperts(2, 8, 12, sites=3))\n"
        "mask = nn.AutogradMask(layer, 0.5, seed=7, per_layer=True)\n"
        "print([mask.masks(step) for step in range(50)])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([mask.masks(step) for step in range(50)])


def test_a_schedule_gives_the_probability_of_each_step():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mask = nn.GradientMask(optimizer, layer, lambda step: 1.0 if step < 3 else 0.0)
    for step in range(5):
        before = layer.experts.up.center.detach().clone()
        train_step(layer, optimizer, step)
        assert bool((before == layer.experts.up.center).all()) == (step < 3)
    assert mask.masked_steps == 3
    assert set(mask.updates.values()) == {2}
    state = mask.state_dict()
    assert state["probability"] is None
    mask.load_state_dict(state)
    bad = nn.GradientMask(optimizer, layer, lambda step: 2.0 if step == 1 else 0.5)
    train_step(layer, optimizer, 5)
    with pytest.raises(tn.InputError, match=r"probability at step 1 must be in \[0, 1\], got 2.0"):
        train_step(layer, optimizer, 6)
    bad.remove()


def test_a_mask_of_a_step_takes_the_probability_of_that_step():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step > 5))
    assert not any(mask.masks(5).values())
    assert all(mask.masks(6).values())


def test_updates_are_counted_where_there_was_a_gradient():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, 0.5, seed=2)
    layer.experts.down.center.requires_grad_(False)
    for step in range(12):
        train_step(layer, optimizer, step)
    assert mask.updates == {
        "experts.up.center": 12 - mask.masked_steps,
        "experts.down.center": 0,
    }
    assert 0 < mask.masked_steps < 12


def test_steps_that_spare_any_tensor_are_counted_as_masked():
    model = torch.nn.ModuleList(make_layer() for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, model, 0.5, per_layer=True)
    for step in range(10):
        for layer in model:
            loss_of(layer, step).backward()
        optimizer.step()
    draws = [mask.masks(step) for step in range(10)]
    assert mask.masked_steps == sum(any(draw.values()) for draw in draws)
    assert mask.masked_steps != sum(all(draw.values()) for draw in draws)
    assert mask.updates == {name: sum(not draw[name] for draw in draws) for name in mask.updates}


def test_given_parameters_are_masked_by_number_each_its_own_layer():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, [*layer.experts.up.aux], 0.5, per_layer=True)
    assert set(mask.updates) == {"0", "1"}
    assert any(len(set(mask.masks(step).values())) == 2 for step in range(20))


def load(layer, only=None, **changes):
    """Give a mask the state of another one, with changes; it must be as before if it refuses."""
    mask = mask_of(layer)
    state = mask_of(layer, 0.25, seed=9).state_dict() | changes
    before = mask.state_dict()
    try:
        mask.load_state_dict({only: state[only]} if only else state)
    except tn.InputError:
        assert mask.state_dict() == before
        raise


def mask_of(layer, probability=0.5, **details):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return nn.GradientMask(optimizer, layer, probability, **details)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer: mask_of(layer, 1.5), r"probability must be in \[0, 1\], got 1.5"),
        (lambda layer: mask_of(layer, -0.1), r"probability must be in \[0, 1\], got -0.1"),
        (lambda layer: mask_of(layer, float("nan")), "probability must be"),
        (
            lambda layer: mask_of(layer, lambda _: 7),
            r"probability at step 0 must be in \[0, 1\], got 7",
        ),
        (lambda layer: mask_of(layer, seed=-1), "seed must be an integer of at least 0, got -1"),
        (
            lambda layer: mask_of(torch.nn.Linear(2, 2)),
            "Linear has no core that experts share",
        ),
        (
            lambda layer: nn.GradientMask(torch.optim.SGD(layer.parameters()), [], 0.5),
            "there is nothing to mask",
        ),
        (
            lambda layer: mask_of(layer, seed=True),
            "seed must be an integer of at least 0, got True",
        ),
        (lambda layer: load(layer, only="seed"), "lacks masked_steps, per_layer, prob"),
        (
            lambda layer: load(layer, per_layer=True),
            "with per_layer=True, this one has per_layer=F",
        ),
        (lambda layer: load(layer, step=-1), "the state's step must be an integer of at least 0"),
        (lambda layer: load(layer, seed=0.5), "the state's seed must be an integer of at least 0"),
        (lambda layer: load(layer, probability=2), r"the state's probability must be in \[0, 1\]"),
        (lambda layer: load(layer, updates=None), "the state is of a mask of None, this one"),
        (
            lambda layer: mask_of(layer).load_state_dict(
                mask_of(layer).state_dict() | {"updates": {"a": 1}}
            ),
            r"the state is of a mask of \['a'\]",
        ),
    ],
)
def test_bad_settings_and_states_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make(make_layer())
