"""Gradient masks: skipped is skipped, momentum and weight decay included."""

import copy

import pytest
import torch
from torch.nn.utils import prune

import tnmoe as tn
from tests.nn.training.small_layer import centers_and_others, loss_of, make_layer, train_step
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


def test_accumulated_gradients_share_the_draw_of_their_step():
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda layer: nn.GradientMask(torch.optim.SGD(layer.parameters()), make_layer(), 0.5),
            "does not hold 2 of the 2 tensors to mask: experts.up.center, experts.down",
        ),
        (
            lambda layer: nn.GradientMask(torch.optim.SGD([*layer.experts.up.aux]), layer, 0.5),
            "does not hold 2 of the 2 tensors",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make(make_layer())
