"""What experts share is a choice: any sites, within a layer and across layers, stored once."""

import copy
import pickle
from itertools import chain, combinations

import pytest
import torch

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.compute.cache import weight_cache
from tnmoe.nn.compute.slots import Groups

SITES, E, H, F = 3, 3, 8, 12
SUBSETS = list(chain.from_iterable(combinations(range(SITES), k) for k in range(SITES)))
SHAPES = {
    "interleaved": tn.MPOShape((2, 3, 2), (3, 2, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(12, 8, 4, 2),
}


@pytest.fixture
def cache():
    weight_cache.clear()
    yield weight_cache
    weight_cache.clear()


def matrices(projection):
    """Matrices (E, out, in) by one contraction of the stored cores: the definition."""
    cores = [projection.core_at(site) for site in range(SITES)]
    cores = [(core[None] if core.ndim == 4 else core).expand(E, -1, -1, -1, -1) for core in cores]
    full = torch.einsum("zaoib,zbpjc,zcqkd->zopqijk", *cores)
    out, in_ = projection.shape.padded_out, projection.shape.padded_in
    return full.reshape(E, out, in_)[:, : projection.out_features, : projection.in_features]


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", "cached"])
@pytest.mark.parametrize("shared", SUBSETS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_any_set_of_sites_gives_the_matrices_of_its_cores_and_their_gradients(name, shared, route):
    torch.manual_seed(0)
    made = nn.MPOProjection(
        E, SHAPES[name], bias=True, max_bond=3, shared_sites=shared, dtype=torch.float64
    )
    made.route = route
    index = torch.tensor([0, 0, 2, 2, 2])
    rows = torch.randn(5, made.in_features, dtype=torch.float64)
    groups = Groups.of(index, E)

    def expected(rows):
        return torch.einsum("toi,ti->to", matrices(made)[index], rows) + made.bias[index]

    with torch.no_grad():
        torch.testing.assert_close(made(rows, groups), expected(rows))
        torch.testing.assert_close(made.weight(), matrices(made))
        for expert in range(E):
            torch.testing.assert_close(made.expert(expert).to_matrix(), matrices(made)[expert])
    if route == "cached":
        return
    results = []
    for way in (lambda rows: made(rows, groups), expected):
        made.zero_grad()
        leaf = rows.clone().requires_grad_()
        way(leaf).square().sum().backward()
        results.append([leaf.grad, *(each.grad.clone() for each in made.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shared", SUBSETS, ids=str)
def test_shared_sites_are_stored_once_and_owned_ones_per_expert(shared):
    shape = SHAPES["interleaved"]
    made = nn.MPOProjection(E, shape, shared_sites=shared)
    sizes = [tn_size(core) for core in shape.core_shapes()]
    expected = sum(size * (1 if site in shared else E) for site, size in enumerate(sizes))
    assert sum(each.numel() for each in made.parameters()) == expected
    assert made.shared_sites == frozenset(shared)
    assert {id(each) for each in made.shared_cores} == {id(made.core_at(site)) for site in shared}
    assert [id(each) for each in nn.shared_parameters(made)] == [id(e) for e in made.shared_cores]


def tn_size(shape):
    size = 1
    for each in shape:
        size *= each
    return size


@pytest.mark.parametrize("shared", ["center", "none", (0,), (0, 1), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("max_bond", [None, 4])
def test_experts_start_as_the_pretrained_matrix_and_noise_spares_what_they_share(shared, max_bond):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(size, generator=generator).double() for size in ((F, H), (H, F)))
    details = {"num_experts": E, "sites": 3, "max_bond": max_bond, "shared_sites": shared}
    exact = nn.MPOExperts.from_dense(up, down, **details)
    noisy = nn.MPOExperts.from_dense(up, down, **details, noise=0.01, rng=0)
    for name, matrix in (("up", up), ("down", down)):
        clean, varied = getattr(exact, name), getattr(noisy, name)
        named = {"center": {clean.center_site}, "none": set()}
        common = set(shared) if isinstance(shared, tuple) else named[shared]
        assert clean.shared_sites == varied.shared_sites == common
        best = tn.decompose(matrix, clean.shape, max_bond=max_bond).to_matrix()
        torch.testing.assert_close(clean.weight().detach(), best.expand(E, -1, -1))
        for site in range(3):
            core, other = clean.core_at(site), varied.core_at(site)
            same = bool((core == other).all())
            assert same == (site in common)
            if not same:
                change = (other - core).detach().flatten(1)
                relative = change.norm() / core.norm()
                assert 0.005 < relative.item() < 0.02
                assert (change[0] != change[1]).any()


@pytest.mark.parametrize("shared", [(1,), (0, 1)], ids=str)
def test_a_shared_mpo_becomes_a_projection_and_back(shared):
    torch.manual_seed(0)
    made = nn.MPOProjection(E, SHAPES["interleaved"], shared_sites=shared, dtype=torch.float64)
    twin = nn.MPOProjection.from_shared_mpo(made.to_shared_mpo())
    torch.testing.assert_close(twin.weight(), made.weight())
    with pytest.raises(tn.InputError, match="these experts own theirs"):
        nn.MPOProjection(E, SHAPES["interleaved"], shared_sites="none").to_shared_mpo()
    with pytest.raises(tn.InputError, match="expert must be an integer from 0 to 2, got 3"):
        made.expert(3)
    for reach in (made.core_at, lambda site: made.set_core(site, made.center)):
        with pytest.raises(tn.InputError, match="site must be an integer from 0 to 2, got 3"):
            reach(3)


@pytest.mark.parametrize("center", range(SITES))
def test_projections_share_the_site_that_the_cores_are_centred_at(center):
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double()
    mpo = tn.decompose(matrix, SHAPES["interleaved"], center_site=center)
    single = nn.MPOProjection.from_mpo(mpo, E)
    several = nn.MPOProjection.from_shared_mpo(tn.SharedMPO.replicate(mpo, E))
    for made in (single, several):
        assert made.center_site == center
        assert made.shared_sites == {center}
        torch.testing.assert_close(made.weight(), matrix.expand(E, -1, -1))


def test_every_site_of_many_can_be_replaced():
    made = nn.MPOProjection(E, tn.MPOShape((2,) * 5, (2,) * 5))
    for site in range(5):
        core = torch.nn.Parameter(made.core_at(site).detach().clone())
        made.set_core(site, core)
        assert made.core_at(site) is core


def test_layers_given_one_after_the_other_or_with_their_routers_are_tied():
    for given in (iter(layers(3)), [nn.MPOMoE(nn.TopKRouter(H, E), each) for each in layers(2)]):
        made = list(given)
        nn.tie_layers(iter(made))
        experts = [getattr(each, "experts", each) for each in made]
        assert all(each.up.center is experts[0].up.center for each in experts)


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", "cached"])
def test_cores_of_several_dtypes_are_used_as_they_train(route, cache):
    torch.manual_seed(0)
    made = nn.MPOProjection(E, SHAPES["interleaved"])
    made.center = torch.nn.Parameter(made.center.detach().bfloat16(), requires_grad=False)
    full = copy.deepcopy(made).float()
    rows, groups = torch.randn(4, made.in_features), Groups.of(torch.tensor([0, 1, 2, 2]), E)
    for each in (made, full):
        each.route = route
    with torch.no_grad():
        torch.testing.assert_close(made(rows, groups), full(rows, groups))
        torch.testing.assert_close(made.weight(), full.weight())


@pytest.mark.parametrize("shared", ["none", (0, 1)], ids=str)
def test_matrices_of_any_choice_are_kept_until_one_of_its_cores_changes(shared, cache):
    made = nn.MPOProjection(E, SHAPES["interleaved"], shared_sites=shared, dtype=torch.float64)
    made.route = "cached"
    rows, index = torch.randn(3, made.in_features, dtype=torch.float64), torch.tensor([0, 1, 2])
    with torch.no_grad():
        for site in range(SITES):
            made(rows, Groups.of(index, E))
            made.core_at(site).mul_(1.5)
            expected = torch.einsum("toi,ti->to", matrices(made)[index], rows)
            torch.testing.assert_close(made(rows, Groups.of(index, E)), expected)


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
    built, build = [], cache_module.build
    monkeypatch.setattr(cache_module, "build", lambda *a: built.append(1) or build(*a))
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
            "up is no MPO in one of the layers: StackedProjection",
        ),
        (
            lambda: [*layers(1), nn.MPOExperts(E, H, F, sites=3)],
            "center",
            "gate is no MPO in one of the layers: None",
        ),
        (
            lambda: [nn.MPOExperts(E, H, F, sites=3), *layers(1)],
            "center",
            "gate is no MPO in one of the layers: None",
        ),
    ],
)
def test_layers_that_cannot_be_tied_are_named_and_left_alone(make, sites, message):
    made = make()
    before = [id(each) for layer in made for each in layer.parameters()]
    with pytest.raises(tn.InputError, match=message):
        nn.tie_layers(made, sites)
    assert [id(each) for layer in made for each in layer.parameters()] == before
