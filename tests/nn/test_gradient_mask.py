"""GradientMask: skipped is skipped, momentum and weight decay included."""

import pytest
import torch

import tnmoe as tn
from tnmoe import nn

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def make_layer() -> nn.MPOMoE:
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, 2), nn.MPOExperts(2, 8, 12, sites=3))


def train_step(layer: nn.MPOMoE, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    layer(torch.randn(6, 8, generator=generator)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_steps_leave_central_tensors_exactly_alone_and_move_all_others(name):
    layer = make_layer()
    optimizer = OPTIMIZERS[name](layer.parameters())
    for step in range(3):  # fill the optimiser's momentum first
        train_step(layer, optimizer, step)
    centers = nn.shared_parameters(layer)
    assert {id(c) for c in centers} == {id(layer.experts.up.center), id(layer.experts.down.center)}
    others = [p for p in layer.parameters() if all(p is not c for c in centers)]
    before = [p.detach().clone() for p in (*centers, *others)]
    with nn.GradientMask(optimizer, layer, probability=1.0):
        train_step(layer, optimizer, 3)
    for old, new in zip(before, (*centers, *others), strict=True):
        assert bool((old == new).all()) == any(new is center for center in centers)
    # Out of the block the mask is gone.
    train_step(layer, optimizer, 4)
    assert all((old != c).any() for old, c in zip(before, centers, strict=False))


def test_probability_zero_changes_nothing():
    plain, masked = make_layer(), make_layer()
    for layer, probability in ((plain, None), (masked, 0.0)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        mask = probability is not None and nn.GradientMask(optimizer, layer, probability)
        for step in range(4):
            train_step(layer, optimizer, step)
        assert not mask or mask.masked_steps == 0
    for one, other in zip(plain.parameters(), masked.parameters(), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_frequency_of_masked_steps_is_the_probability(probability):
    layer = make_layer()
    mask = nn.GradientMask(torch.optim.SGD(layer.parameters(), lr=0.1), layer, probability, seed=3)
    steps = 4000
    share = sum(mask.masks(step) for step in range(steps)) / steps
    deviation = (probability * (1 - probability) / steps) ** 0.5
    assert abs(share - probability) < 4 * deviation


def test_draws_depend_on_seed_and_step_alone_and_resume_from_a_state_dict():
    def run(steps, mask=None, state=None):
        layer = make_layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        mask = nn.GradientMask(optimizer, layer, 0.5, seed=11)
        if state:
            mask.load_state_dict(state)
        draws = []
        for step in steps:
            before = layer.experts.up.center.detach().clone()
            train_step(layer, optimizer, step)
            draws.append(bool((before == layer.experts.up.center).all()))
        return draws, mask

    whole, mask = run(range(20))
    assert whole == [mask.masks(step) for step in range(20)]
    assert 0 < sum(whole) == mask.masked_steps < 20
    first, mask = run(range(8))
    rest, _ = run(range(8, 20), state=mask.state_dict())
    assert first + rest == whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda layer, o: nn.GradientMask(o, layer, 1.5),
            r"probability must be in \[0, 1\], got 1.5",
        ),
        (lambda layer, o: nn.GradientMask(o, layer, float("nan")), "probability must be"),
        (lambda layer, o: nn.GradientMask(o, torch.nn.Linear(2, 2), 0.5), "no central tensor"),
        (
            lambda layer, o: nn.GradientMask(o, make_layer(), 0.5),
            "does not hold 2 of the 2 central",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    layer = make_layer()
    with pytest.raises(tn.InputError, match=message):
        make(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
