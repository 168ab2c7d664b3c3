"""Projections whose experts share the cores of any set of sites."""

import copy
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


@pytest.mark.parametrize("shared", SUBSETS, ids=str)
@pytest.mark.parametrize("experts", [1, E])
def test_a_projection_becomes_a_shared_mpo_and_back_with_the_memory_of_its_cores(experts, shared):
    torch.manual_seed(0)
    made = nn.MPOProjection(experts, SHAPES["padded"], shared_sites=shared, dtype=torch.float64)
    operator = made.to_shared_mpo()
    assert operator.shared_sites == frozenset(shared)
    assert (operator.num_experts, operator.center_site) == (experts, made.center_site)
    for site in range(SITES):
        assert operator.cores[site].data_ptr() == made.core_at(site).data_ptr()
    twin = nn.MPOProjection.from_shared_mpo(operator)
    assert twin.shared_sites == made.shared_sites
    torch.testing.assert_close(twin.weight(), made.weight())
    torch.testing.assert_close(operator.to_matrices(), made.weight())
    operator.to_matrices().square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_cores_of_several_dtypes_make_a_shared_mpo_of_the_widest():
    made = nn.MPOProjection(E, SHAPES["interleaved"])
    made.center = torch.nn.Parameter(made.center.detach().bfloat16())
    operator = made.to_shared_mpo()
    assert {core.dtype for core in operator.cores} == {torch.float32}
    torch.testing.assert_close(operator.to_matrices(), made.weight())


@pytest.mark.parametrize("sites", [((4, 3), (1, 8)), ((12, 1), (2, 4))], ids=str)
def test_a_projection_around_a_linear_module_becomes_a_shared_mpo_and_back(sites):
    torch.manual_seed(0)
    made = nn.HiddenProjection(E, tn.MPOShape(*sites))
    operator = made.to_shared_mpo()
    assert operator.shared_sites == {made.center_site}
    assert operator.center.data_ptr() == made.base.weight.data_ptr()
    torch.testing.assert_close(operator.to_matrices(), made.weight())
    for kind in (nn.HiddenProjection, nn.MPOProjection):
        torch.testing.assert_close(kind.from_shared_mpo(operator).weight(), made.weight())


def test_what_a_projection_cannot_hold_or_reach_is_named():
    made = nn.MPOProjection(E, SHAPES["interleaved"])
    single = tn.MPO([torch.ones(1, 4, 4, 1)])
    for foreign, message in (
        (tn.SharedMPO.from_base(single, E), "an MPOProjection has no base: got SharedMPO"),
        (tn.SharedMPO.replicate(single, E, "none"), "need a shape of at least 2 sites"),
    ):
        with pytest.raises(tn.InputError, match=message):
            nn.MPOProjection.from_shared_mpo(foreign)
    owned = nn.MPOProjection(E, tn.MPOShape((4, 3), (1, 8)), shared_sites="none").to_shared_mpo()
    with pytest.raises(tn.InputError, match="a HiddenProjection has one central core, got 3"):
        nn.HiddenProjection.from_shared_mpo(owned)
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


@pytest.mark.parametrize("layout", ["split", "hidden"])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_new_matrices_have_the_variance_of_linear_layers_at_any_bond(layout, ratio):
    torch.manual_seed(0)
    experts = nn.MPOExperts(4, 64, 128, layout=layout, group_size=16, bond_ratio=ratio)
    for projection in (experts.up, experts.down):
        variance = float(projection.weight().detach().var())
        assert variance == pytest.approx(1 / (3 * projection.in_features), rel=0.1)
