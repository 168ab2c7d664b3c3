"""Gradient masks: skipped is skipped, momentum and weight decay included, as (seed, step) says."""

import copy
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import prune

import tnmoe as tn
from tnmoe import nn

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p, weight_decay=0.1)
        for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam")
    },
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


def make_layer() -> nn.MPOMoE:
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, 2), nn.MPOExperts(2, 8, 12, sites=3))


def loss_of(layer, step):
    generator = torch.Generator().manual_seed(step)
    return layer(torch.randn(6, 8, generator=generator)).square().sum()


def train_step(layer, optimizer, step, closure=False) -> None:
    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(layer, step)
        loss.backward()
        return loss

    if closure == "keyword":
        optimizer.step(closure=evaluate)
    elif closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def centers_and_others(layer):
    centers = nn.shared_parameters(layer)
    return centers, [p for p in layer.parameters() if all(p is not c for c in centers)]


@pytest.mark.parametrize("closure", [False, "positional", "keyword"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_steps_leave_central_tensors_exactly_alone_and_move_all_others(name, closure):
    layer = make_layer()
    optimizer = OPTIMIZERS[name](layer.parameters())
    for step in range(3):  # fill the optimiser's memory first
        train_step(layer, optimizer, step)
    centers, others = centers_and_others(layer)
    assert {id(c) for c in centers} == {id(layer.experts.up.center), id(layer.experts.down.center)}
    before = [p.detach().clone() for p in (*centers, *others)]
    memory = copy.deepcopy([optimizer.state[center] for center in centers])
    with nn.GradientMask(optimizer, layer, probability=1.0) as mask:
        train_step(layer, optimizer, 3, closure)
    for old, new in zip(before, (*centers, *others), strict=True):
        assert bool((old == new).all()) == any(new is center for center in centers)
    for old, center in zip(memory, centers, strict=True):
        for key, value in optimizer.state[center].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(old[key])), key
    # Out of the block the mask is gone.
    train_step(layer, optimizer, 4, closure)
    assert mask.step == 1
    assert all((old != c).any() for old, c in zip(before, centers, strict=False))


def test_a_masked_step_of_lbfgs_moves_central_tensors_not_at_all_whatever_it_remembers():
    layer = make_layer()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.01, max_iter=4)
    for step in range(2):
        train_step(layer, optimizer, step, closure=True)
    centers, others = centers_and_others(layer)
    before = [p.detach().clone() for p in (*centers, *others)]
    with nn.GradientMask(optimizer, layer, probability=1.0):
        train_step(layer, optimizer, 2, closure=True)
    for old, new in zip(before, (*centers, *others), strict=True):
        assert bool((old == new).all()) == any(new is center for center in centers)


@pytest.mark.parametrize(("name", "closure"), [("AdamW", False), ("AdamW", True), ("LBFGS", True)])
def test_probability_zero_changes_nothing(name, closure):
    plain, masked = make_layer(), make_layer()
    for layer in (plain, masked):
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.01)
        mask = nn.GradientMask(optimizer, layer, 0.0) if layer is masked else None
        for step in range(4):
            train_step(layer, optimizer, step, closure)
    assert mask.masked_steps == 0
    assert set(mask.updates.values()) == {4}
    for one, other in zip(plain.parameters(), masked.parameters(), strict=True):
        assert (one == other).all()


def test_a_closure_that_fails_leaves_nothing_behind_for_the_next_step():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, 1.0)

    def fail():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fail)
    assert (mask.step, mask.masked_steps) == (0, 0)
    value = layer.experts.up.center.detach() + 1
    layer.experts.up.center.data.copy_(value)
    train_step(layer, optimizer, 0)
    assert torch.equal(layer.experts.up.center, value)


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


def test_half_precisiond_gradients_share_the_draw_of_their_step():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mask = nn.GradientMask(optimizer, layer, 0.5, seed=1)
    for step in range(10):
        optimizer.zero_grad()
        for part in range(4):
            loss_of(layer, 4 * step + part).backward()
        gradient = layer.experts.up.center.grad.clone()
        before = layer.experts.up.center.detach().clone()
        optimizer.step()
        masked = all(mask.masks(step).values())
        expected = before if masked else before - 0.01 * gradient
        torch.testing.assert_close(layer.experts.up.center.detach(), expected)
    assert mask.step == 10
    assert 0 < mask.masked_steps < 10


def test_a_closure_that_fails_in_the_middle_leaves_masked_tensors_where_they_were():
    layer = make_layer()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=4)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step == 1))
    train_step(layer, optimizer, 0, closure=True)
    before = [each.detach().clone() for each in nn.shared_parameters(layer)]
    calls = []

    def fails_later():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no loss")
        optimizer.zero_grad()
        loss = loss_of(layer, 1)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fails_later)
    assert mask.step == 1
    for old, new in zip(before, nn.shared_parameters(layer), strict=True):
        assert torch.equal(old, new)


class Parent(torch.optim.SGD):
    """An optimiser whose step goes on to its parent's, with hooks at every level."""

    def step(self, closure=None, note=None):
        self.note = note
        return super().step(closure)


class Child(Parent):
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


@pytest.mark.parametrize("way", ["helper", "in backward"])
def test_a_gradient_scaler_steps_where_every_tensor_of_its_optimiser_is_masked(way):
    layer = make_layer()
    centers = nn.shared_parameters(layer)
    optimizer = torch.optim.SGD(centers, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mask = nn.GradientMask(optimizer, layer, 1.0, zero_in_backward=way == "in backward")
    before = [each.detach().clone() for each in centers]
    scaler.scale(loss_of(layer, 0)).backward()
    scaler.unscale_(optimizer)
    if way == "helper":
        assert mask.clip_grad_norm_(centers, 1.0) == 0
    scaler.step(optimizer)
    scaler.update()
    assert mask.masked_steps == 1
    assert all(torch.equal(old, new) for old, new in zip(before, centers, strict=True))


def test_gradients_are_masked_in_the_backward_pass_by_the_step_that_is_coming():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step == 2), zero_in_backward=True)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(layer, step).backward()
        assert bool(layer.experts.up.center.grad.any()) == (step != 2)
        optimizer.step()
    assert mask.updates == {"experts.up.center": 3, "experts.down.center": 3}


def test_tensors_thawed_later_are_masked_in_the_backward_pass_too():
    layer = make_layer()
    nn.freeze_shared(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nn.GradientMask(optimizer, layer, 1.0, zero_in_backward=True)
    assert not layer.experts.up.center.requires_grad
    nn.freeze_shared(layer, frozen=False)
    loss_of(layer, 0).backward()
    assert not layer.experts.up.center.grad.any()


def test_a_mask_of_a_step_asks_for_the_probability_of_that_step():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step > 5))
    assert not any(mask.masks(5).values())
    assert all(mask.masks(6).values())


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_what_a_central_core_is_made_from_is_masked_in_its_place(how):
    layer = make_layer()
    up = layer.experts.up
    if how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(up, "center", torch.nn.Tanh())
        stored = up.parametrizations.center.original
    else:
        prune.l1_unstructured(up, "center", amount=0.3)
        stored = up.center_orig
    assert any(each is stored for each in nn.shared_parameters(layer))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, 1.0)
    assert len(mask.updates) == 2
    before = stored.detach().clone()
    train_step(layer, optimizer, 0)
    assert torch.equal(stored, before)
    assert sum(len(group["params"]) for group in nn.parameter_groups(layer, 0.1)[1:]) == 2
    nn.freeze_shared(layer)
    assert not stored.requires_grad


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("way", ["helper", "apply", "in backward"])
def test_masked_gradients_do_not_spend_the_budget_of_clipping(way, norm_type):
    layer, plain = make_layer(), make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = nn.GradientMask(optimizer, layer, 1.0, zero_in_backward=way == "in backward")
    centers, others = centers_and_others(plain)
    for part in range(2):
        loss_of(layer, part).backward()
        loss_of(plain, part).backward()
    expected = torch.nn.utils.clip_grad_norm_(others, 0.5, norm_type=norm_type)
    if way == "helper":
        norm = mask.clip_grad_norm_(layer.parameters(), 0.5, norm_type=norm_type)
    else:
        if way == "apply":
            mask.zero_masked_gradients()
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5, norm_type=norm_type)
    torch.testing.assert_close(norm, expected)
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        if any(other is center for center in centers):
            assert not one.grad.any()  # there for a GradScaler, which wants one gradient at least
        else:
            torch.testing.assert_close(one.grad, other.grad)
    optimizer.step()
    assert all(each.grad is None for each in nn.shared_parameters(layer))
    assert (mask.step, mask.masked_steps) == (1, 1)
    mask.remove()
    loss_of(layer, 0).backward()
    assert layer.experts.up.center.grad is not None


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_skips_steps_by_itself_and_masks_the_others(fused):
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step == 1))

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(loss_of(layer, 0) * factor).backward()
        before = [each.detach().clone() for each in layer.parameters()]
        scaler.step(optimizer)
        scaler.update()
        return [
            bool((old == new).all()) for old, new in zip(before, layer.parameters(), strict=True)
        ]

    centers = [any(each is c for c in nn.shared_parameters(layer)) for each in layer.parameters()]
    assert not any(step(1.0))
    assert step(1.0) == centers
    assert all(step(float("inf")))
    assert mask.step == (3 if fused else 2)
    assert not any(step(1.0))


def test_parameter_groups_are_masked_wherever_the_tensors_are():
    layer = make_layer()
    optimizer = torch.optim.AdamW(nn.parameter_groups(layer, lr=0.1, shared_scale=0.5))
    centers, others = centers_and_others(layer)
    before = [each.detach().clone() for each in (*centers, *others)]
    with nn.GradientMask(optimizer, layer, 1.0):
        train_step(layer, optimizer, 0)
    moved = [bool((a != b).any()) for a, b in zip(before, (*centers, *others), strict=True)]
    assert moved == [False] * len(centers) + [True] * len(others)


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


# ---- the variant for engines that step inside backward


def stepping_in_backward(layer):
    """torch's own such engine: every tensor is updated as soon as its gradient is there."""
    _apply_optimizer_in_backward(torch.optim.SGD, layer.parameters(), {"lr": 0.01})


def test_an_engine_that_steps_in_backward_skips_what_the_other_mask_skips():
    engine, plain = make_layer(), make_layer()
    stepping_in_backward(engine)
    mask = nn.AutogradMask(engine, 0.5, seed=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    other = nn.GradientMask(optimizer, plain, 0.5, seed=5)
    for step in range(12):
        with mask.next_step():
            loss_of(engine, step).backward()
        train_step(plain, optimizer, step)
        for one, two in zip(engine.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert mask.state_dict() == other.state_dict()
    assert 0 < mask.masked_steps < 12
    assert all(each.requires_grad for each in engine.parameters())


def test_a_step_that_fails_is_no_step_and_frozen_tensors_stay_frozen():
    layer = make_layer()
    layer.experts.up.center.requires_grad_(False)
    mask = nn.AutogradMask(layer, 1.0)
    with pytest.raises(RuntimeError, match="lost"), mask.next_step():
        raise RuntimeError("lost")
    assert mask.step == 0
    with mask.next_step():
        assert not layer.experts.down.center.requires_grad
        for part in range(2):  # several passes make one step
            loss_of(layer, part).backward()
    assert mask.step == 1
    assert layer.experts.down.center.requires_grad
    assert not layer.experts.up.center.requires_grad
    assert layer.experts.down.center.grad is None
    assert layer.experts.down.aux[0].grad is not None


def test_gradients_left_as_zeros_move_no_masked_tensor_by_its_momentum():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    mask = nn.AutogradMask(layer, lambda step: float(step == 1))
    for step in range(2):
        optimizer.zero_grad(set_to_none=False)
        before = layer.experts.up.center.detach().clone()
        with mask.next_step():
            loss_of(layer, step).backward()
        optimizer.step()
        assert torch.equal(before, layer.experts.up.center) == (step == 1)


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
            "Linear has no tensor that experts share",
        ),
        (
            lambda layer: nn.GradientMask(torch.optim.SGD(layer.parameters()), [], 0.5),
            "there is nothing to mask",
        ),
        (
            lambda layer: nn.GradientMask(torch.optim.SGD(layer.parameters()), make_layer(), 0.5),
            "does not hold 2 of the 2 shared tensors to mask: experts.up.center, experts.down",
        ),
        (
            lambda layer: nn.GradientMask(torch.optim.SGD([*layer.experts.up.aux]), layer, 0.5),
            "does not hold 2 of the 2 shared tensors",
        ),
        (
            lambda layer: nn.GradientMask(layer, layer, 0.5),
            "optimizer must be a torch.optim.Optimizer, got MPOMoE; .* AutogradMask",
        ),
        (lambda layer: nn.AutogradMask(layer, 2), r"probability must be in \[0, 1\], got 2"),
        (
            lambda layer: mask_of(layer, seed=True),
            "seed must be an integer of at least 0, got True",
        ),
        (
            lambda layer: nn.GradientMask(HasNoHooks(None), layer, 0.5),
            "optimizer must be a torch.optim.Optimizer, got HasNoHooks",
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
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make(make_layer())
