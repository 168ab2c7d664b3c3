"""Training utilities know the linear modules that experts share, and spare their biases."""

import copy
import pickle

import pytest
import torch
from torch import nn as torch_nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import parametrize

import tnmoe as tn
from tests.nn.training.small_layer import backward, loss_of, train_step
from tnmoe import nn
from tnmoe.nn.training.base_mask import BaseMask

LAYOUTS = {
    "hidden": {"layout": "hidden", "group_size": 4},
    "hidden, two owned sites": {"layout": "hidden", "group_size": (2, 3)},
    "residual": {"layout": "residual", "max_bond": 2},
    "residual, end shared": {
        "layout": "residual", "sites": 3, "max_bond": 2, "shared_sites": {"up": (2,), "down": (0,)},
    },
}  # fmt: skip
E = 4


def make(kind, modules=True, gated=True):
    """Make a layer whose experts share linear modules that have biases of their own."""
    torch.manual_seed(0)
    sizes = {"up": (8, 12), "down": (12, 8)} | ({"gate": (8, 12)} if gated else {})
    given = {name: torch_nn.Linear(*size) for name, size in sizes.items()}
    experts = nn.MPOExperts.from_dense(
        **given, num_experts=E, activation="gelu", noise=0.1, rng=0, **LAYOUTS[kind]
    )
    return nn.MPOMoE(nn.TopKRouter(8, E, 2), experts)


def shared_names(layer):
    """Return the names of the modules' matrices and of shared cores, by what experts own."""
    return {
        name
        for name, each in layer.named_parameters()
        if name.endswith("base.weight") or (".aux_" in name and len(each) == 1)
        or (name.endswith("delta.center") and each.ndim == 4)
    }  # fmt: skip


def owned_names(layer):
    names = {name for name, _ in layer.named_parameters() if "aux_" in name or "center" in name}
    return names - shared_names(layer)


def ids(parameters):
    return {id(each) for each in parameters}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_shared_parameters_are_the_matrices_of_modules_and_no_biases(kind):
    layer = make(kind)
    named = dict(layer.named_parameters())
    assert ids(nn.shared_parameters(layer)) == ids(named[name] for name in shared_names(layer))
    owned = [
        each
        for part in (layer.experts.up, layer.experts.gate, layer.experts.down)
        for each in part.owned_parameters
    ]
    assert ids(owned) == ids(named[name] for name in owned_names(layer))
    assert len(shared_names(layer)) >= 3
    assert len(owned_names(layer)) >= 3


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_mask_spares_shared_modules_and_moves_all_else(kind, closure):
    layer = make(kind)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        train_step(layer, optimizer, step)
    before = copy.deepcopy(dict(layer.named_parameters()))
    with nn.GradientMask(optimizer, layer, 1.0) as mask:
        train_step(layer, optimizer, 2, closure)
    assert set(mask.updates) == shared_names(layer)
    for name, each in layer.named_parameters():
        assert torch.equal(each, before[name]) == (name in shared_names(layer)), name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_masks_in_backward_and_around_the_step_draw_and_do_the_same(kind):
    engine, plain = make(kind), make(kind)
    _apply_optimizer_in_backward(torch.optim.SGD, engine.parameters(), {"lr": 0.01})
    mask = nn.AutogradMask(engine, 0.5, seed=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    other = nn.GradientMask(optimizer, plain, 0.5, seed=5)
    for step in range(8):
        with mask.next_step():
            loss_of(engine, step).backward()
        train_step(plain, optimizer, step)
        for one, two in zip(engine.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert mask.state_dict() == other.state_dict()
    assert 0 < mask.masked_steps < 8
    assert all(each.requires_grad for each in engine.parameters())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_masked_gradients_are_zero_in_the_backward_pass_and_a_run_resumes(kind):
    layer = make(kind)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    mask = nn.GradientMask(optimizer, layer, lambda step: float(step == 1), zero_in_backward=True)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(layer, step).backward()
        assert bool(layer.experts.up.base.weight.grad.any()) == (step != 1)
        assert layer.experts.up.base.bias.grad.any()
        optimizer.step()
    resumed = make(kind)
    resumed.load_state_dict(layer.state_dict())
    again = nn.GradientMask(torch.optim.SGD(resumed.parameters(), lr=0.01), resumed, 0.5)
    again.load_state_dict(mask.state_dict())
    assert again.updates == dict.fromkeys(shared_names(layer), 2)


def test_in_a_stack_every_layer_has_a_draw_of_its_own():
    stack = torch_nn.Sequential(*map(make, LAYOUTS))
    mask = BaseMask(stack, 0.5, seed=0, per_layer=True)
    draws = mask.masks(0)
    for number in range(len(LAYOUTS)):
        mine = [drawn for name, drawn in draws.items() if name.startswith(f"{number}.")]
        assert len(set(mine)) == 1
    assert any(len(set(mask.masks(step).values())) == 2 for step in range(9))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_frozen_modules_keep_trained_biases_and_get_no_gradient(kind):
    layer = make(kind)
    named = dict(layer.named_parameters())
    assert nn.freeze_shared(layer) == sum(named[name].numel() for name in shared_names(layer))
    backward(layer)
    for name, each in named.items():
        assert (each.grad is None) == (name in shared_names(layer)), name
    nn.freeze_shared(layer, frozen=False)
    assert all(each.requires_grad for each in layer.parameters())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_auxiliary_training_moves_what_experts_own(kind):
    layer = make(kind)
    count = nn.train_auxiliary(layer)
    trained = {name for name, each in layer.named_parameters() if each.requires_grad}
    assert trained == owned_names(layer)
    assert count == sum(each.numel() for each in layer.parameters() if each.requires_grad)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_shared_modules_have_a_learning_rate_of_their_own(kind):
    layer = make(kind)
    own, shared = nn.parameter_groups(layer, lr=0.1)
    named = dict(layer.named_parameters())
    assert ids(shared["params"]) == ids(named[name] for name in shared_names(layer))
    assert len(own["params"]) + len(shared["params"]) == len(named)
    assert shared["lr"] == pytest.approx(0.1 / E)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gradients_of_shared_modules_are_scaled_once(kind):
    plain, scaled = make(kind), make(kind)
    backward(plain)
    with nn.SharedGradientScale(scaled):
        backward(scaled)
    expected = dict(plain.named_parameters())
    for name, each in scaled.named_parameters():
        factor = 1 / E if name in shared_names(scaled) else 1
        torch.testing.assert_close(each.grad, expected[name].grad * factor, msg=name)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_a_shared_matrix_is_made_from_is_spared_in_its_place(kind):
    layer = make(kind)
    base = layer.experts.up.base
    parametrize.register_parametrization(base, "weight", torch_nn.Tanh())
    original = base.parametrizations.weight.original
    assert any(each is original for each in nn.shared_parameters(layer))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = original.detach().clone()
    with nn.GradientMask(optimizer, layer, 1.0):
        train_step(layer, optimizer, 0)
    assert torch.equal(original, before)


def run(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


@pytest.mark.parametrize("kind", LAYOUTS)
def test_tied_layers_have_one_matrix_with_the_gradients_of_all_and_their_own_biases(kind):
    tied, free = ([make(kind) for _ in range(3)] for _ in range(2))
    with torch.no_grad():
        for number, layer in enumerate(tied):
            layer.experts.down.base.bias += number
    nn.tie_layers(tied)
    for one, other in zip(tied, free, strict=True):
        other.load_state_dict(one.state_dict())
    x = torch.randn(5, 8)
    for each in (tied, free):
        run(each, x).square().sum().backward()
    torch.testing.assert_close(run(tied, x), run(free, x))
    for name in ("up", "gate", "down"):
        bases = [getattr(layer.experts, name).base for layer in tied]
        parts = [getattr(layer.experts, name).base for layer in free]
        assert all(base.weight is bases[0].weight for base in bases)
        torch.testing.assert_close(
            bases[0].weight.grad, sum(part.weight.grad for part in parts), rtol=1e-4, atol=1e-5
        )
        for base, part in zip(bases, parts, strict=True):
            torch.testing.assert_close(base.bias.grad, part.bias.grad, rtol=1e-4, atol=1e-5)
    model = torch_nn.ModuleList(tied)
    loaded = torch_nn.ModuleList(make(kind) for _ in range(3))
    nn.tie_layers(loaded)
    loaded.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert twin[0].experts.up.base.weight is twin[2].experts.up.base.weight
        torch.testing.assert_close(run(twin, x), run(tied, x))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_sites_of_experts_mpos_are_tied_by_their_numbers(kind):
    layers = [make(kind) for _ in range(2)]
    first, second = (layer.experts.up for layer in layers)
    chains = [getattr(each, "delta", each) for each in (first, second)]
    nn.tie_layers(layers, [1] if "residual" in kind or "two" in kind else [0])
    number = 1 if "residual" in kind or "two" in kind else 0
    assert chains[0].core_at(number) is chains[1].core_at(number)
    assert first.base.weight is not second.base.weight
    run(layers, torch.randn(5, 8)).sum().backward()


def conv1d(layer):
    for name in ("up", "gate", "down"):
        part = getattr(layer.experts, name)
        part.base = torch_nn.Sequential()
    return layer


@pytest.mark.parametrize(
    ("make_layers", "sites", "message"),
    [
        (lambda: [make("hidden"), make("residual")], "center", "up differs in its layout"),
        (
            lambda: [make("hidden"), make("hidden, two owned sites")],
            "center",
            "up differs in its shape",
        ),
        (lambda: [make("residual"), make("residual")], [2], "every site must be an integer"),
        (
            lambda: [make("residual"), conv1d(make("residual"))],
            "center",
            "up.base is not alike in all layers: Linear.* and Sequential",
        ),
    ],
)
def test_layers_that_cannot_be_tied_are_named_and_left_alone(make_layers, sites, message):
    layers = make_layers()
    before = [id(each) for layer in layers for each in layer.parameters()]
    with pytest.raises(tn.InputError, match=message):
        nn.tie_layers(layers, sites)
    assert [id(each) for layer in layers for each in layer.parameters()] == before


def test_the_core_of_a_module_is_replaced_with_the_module():
    projection = make("hidden").experts.up
    site = projection.center_site
    assert projection.core_at(site).data_ptr() == projection.base.weight.data_ptr()
    (stored,) = projection.parameters_at(site)
    assert stored is projection.base.weight
    with pytest.raises(tn.InputError, match="the matrix of a linear module: replace `base`"):
        projection.set_core(site, torch_nn.Parameter(projection.center.detach()))
    core = torch_nn.Parameter(torch.randn_like(projection.core_at(0)))
    projection.set_core(0, core)
    assert projection.core_at(0) is core


@pytest.mark.parametrize("kind", LAYOUTS)
def test_load_biases_are_balanced_beside_shared_modules(kind):
    layer = make(kind)
    layer.router = nn.TopKRouter(8, E, 1, score_function="sigmoid", load_bias=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    with nn.BiasBalancer(optimizer, layer, rate=0.1), nn.GradientMask(optimizer, layer, 0.5):
        for step in range(3):
            train_step(layer, optimizer, step)
    assert layer.router.load_bias.value.any()
