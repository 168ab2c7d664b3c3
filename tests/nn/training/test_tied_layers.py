"""Layers that share cores have one tensor with the gradients of all."""

import copy
import pickle

import pytest
import torch

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.compute.cache import weight_cache

SITES, E, H, F = 3, 3, 8, 12


@pytest.fixture
def cache():
    weight_cache.clear()
    yield weight_cache
    weight_cache.clear()


def test_layers_given_one_after_the_other_or_with_their_routers_are_tied():
    for given in (iter(layers(3)), [nn.MPOMoE(nn.TopKRouter(H, E), each) for each in layers(2)]):
        made = list(given)
        nn.tie_layers(iter(made))
        experts = [getattr(each, "experts", each) for each in made]
        assert all(each.up.center is experts[0].up.center for each in experts)


def layers(count=3, **details):
    torch.manual_seed(0)
    return [
        nn.MPOExperts(E, H, F, "silu", gated=True, sites=3, dtype=torch.float64, **details)
        for _ in range(count)
    ]


def run(layers, x):
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])
    weights = torch.tensor([[0.7, 0.3]] * 4, dtype=torch.float64)
    for layer in layers:
        x = x + layer(x, index, weights)
    return x


@pytest.mark.parametrize("sites", ["center", (1, 2), (0,)], ids=str)
def test_tied_layers_have_one_tensor_with_the_gradients_of_all(sites):
    tied, free = layers(), layers()
    nn.tie_layers(tied, sites)
    # The same numbers in tensors of their own: their gradients are the parts of the sum.
    for one, other in zip(tied, free, strict=True):
        other.load_state_dict(one.state_dict())
    x = torch.randn(4, H, dtype=torch.float64)
    torch.testing.assert_close(run(tied, x), run(free, x))
    for each in (tied, free):
        run(each, x).square().sum().backward()
    chosen = {1} if sites == "center" else set(sites)
    for name in ("up", "gate", "down"):
        for site in range(3):
            cores = [getattr(layer, name).core_at(site) for layer in tied]
            parts = [getattr(layer, name).core_at(site).grad for layer in free]
            if site in chosen:
                assert all(core is cores[0] for core in cores)
                torch.testing.assert_close(cores[0].grad, sum(parts))
            else:
                assert len({id(core) for core in cores}) == 3
                for core, part in zip(cores, parts, strict=True):
                    torch.testing.assert_close(core.grad, part)


def test_ties_are_counted_once_and_survive_copies_pickles_and_state_dicts():
    model = torch.nn.ModuleList(layers())
    total = sum(each.numel() for each in model.parameters())
    nn.tie_layers(model)
    centers = [model[0].up.center, model[0].gate.center, model[0].down.center]
    saved = 2 * sum(each.numel() for each in centers)
    assert sum(each.numel() for each in model.parameters()) == total - saved
    assert {id(each) for each in nn.shared_parameters(model)} == set(map(id, centers))
    loaded = torch.nn.ModuleList(layers())
    nn.tie_layers(loaded)
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(4, H, dtype=torch.float64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert twin[0].up.center is twin[2].up.center
        torch.testing.assert_close(run(twin, x), run(model, x))


def test_tied_layers_keep_their_matrices_side_by_side(cache, monkeypatch):
    from tnmoe.nn.compute import cache as cache_module

    tied = layers(2)
    nn.tie_layers(tied)
    for layer in tied:
        for name in ("up", "gate", "down"):
            getattr(layer, name).route = "cached"
    built, build = [], cache_module.build_matrices
    monkeypatch.setattr(cache_module, "build_matrices", lambda *a: built.append(1) or build(*a))
    with torch.no_grad():
        x = torch.randn(4, H, dtype=torch.float64)
        first = run(tied, x)
        assert len(built) == 6
        assert run(tied, x).equal(first)
        assert len(built) == 6
        assert cache.used == 6 * E * H * F * 8
        tied[0].up.center.mul_(2)
        assert not torch.allclose(run(tied, x), first)
        assert len(built) == 8
    del tied, layer
    assert cache.used == 0


def test_input_cores_tied_between_gate_and_up_are_applied_once_under_autocast(monkeypatch):
    from tnmoe.nn.compute import joint as joint_module

    layer = nn.MPOExperts(E, H, F, "silu", gated=True, sites=3)
    layer.gate.set_core(layer.up.shape.sites - 1, layer.up.aux[-1])
    for name in ("up", "gate", "down"):
        getattr(layer, name).route = "joint"
    products, multiply = [], joint_module._multiply
    monkeypatch.setattr(joint_module, "_multiply", lambda *a: products.append(a) or multiply(*a))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, H), torch.tensor([[0], [1], [2], [0]]), torch.ones(4, 1))
    assert len(products) == 3 * 3 - 1


def recentred():
    """Experts of the same shapes whose centres lie elsewhere."""
    (made,) = layers(1)
    for name in ("up", "gate", "down"):
        each = getattr(made, name)
        mpo = tn.decompose(each.weight()[0].detach(), each.shape, center_site=2)
        setattr(made, name, nn.MPOProjection.from_mpo(mpo, E))
    return made


@pytest.mark.parametrize(
    ("make", "sites", "message"),
    [
        (lambda: layers(1), "center", "at least two layers, got 1"),
        (lambda: layers(), 1, "sites must be 'center' or the numbers of sites, got 1"),
        (
            lambda: [*layers(1), torch.nn.Linear(2, 2)],
            "center",
            "layers must be Experts, or an MPOMoE of them, got Linear",
        ),
        (
            lambda: [*layers(1), recentred()],
            "center",
            "up differs in the site of its centre: 1 and 2",
        ),
        (lambda: layers(), "aux", "sites must be 'center' or the numbers of sites, got 'aux'"),
        (lambda: layers(), [], "sites must name at least one site, got none"),
        (lambda: layers(), [1, 3], "every site must be an integer from 0 to 2, got 3"),
        (
            lambda: [*layers(2), *layers(1, max_bond={"down": 2})],
            "center",
            r"down's cores of site 1 differ in shape: \(\d+, .*\) and \(2, .*\)",
        ),
        (
            lambda: [*layers(1), nn.MPOExperts(E, H, 16, gated=True, sites=3)],
            "center",
            "up differs in its shape",
        ),
        (
            lambda: [*layers(1), nn.DenseExperts(E, H, F, gated=True)],
            "center",
            "up is not an MPO in one of the layers: StackedProjection",
        ),
        (
            lambda: [*layers(1), nn.MPOExperts(E, H, F, sites=3)],
            "center",
            "gate is not an MPO in one of the layers: None",
        ),
        (
            lambda: [nn.MPOExperts(E, H, F, sites=3), *layers(1)],
            "center",
            "gate is not an MPO in one of the layers: None",
        ),
    ],
)
def test_layers_that_cannot_be_tied_are_named_and_left_alone(make, sites, message):
    made = make()
    before = [id(each) for layer in made for each in layer.parameters()]
    with pytest.raises(tn.InputError, match=message):
        nn.tie_layers(made, sites)
    assert [id(each) for layer in made for each in layer.parameters()] == before
