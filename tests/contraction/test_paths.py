"""Orders of contraction: their cost against opt_einsum's count, and the work to find them."""

from itertools import permutations
from math import prod

import numpy as np
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe.contraction import paths
from tnmoe.contraction import plan as plan_module


@st.composite
def chains(draw, most=7, least_bond=1):
    """Shapes of cores, and a number of vectors."""
    sites = draw(st.integers(1, most))
    legs = st.lists(st.integers(1, 4), min_size=sites, max_size=sites)
    bonds = st.lists(st.integers(least_bond, 8), min_size=sites - 1, max_size=sites - 1)
    outs, ins, inner = draw(legs), draw(legs), draw(bonds)
    cores = tuple(zip((1, *inner), outs, ins, (*inner, 1), strict=True))
    return cores, draw(st.sampled_from([None, 1, 2, 7, 64, 1000]))


def counted_by_opt_einsum(cores, batch, optimize):
    network = paths.Network.of(cores, batch is not None)
    shapes = network.shapes(batch)
    return opt_einsum.contract_path(network.equation(), *shapes, shapes=True, optimize=optimize)[1]


def searched(cores, batch):
    return paths._with_costs(
        paths.Network.of(cores, batch is not None), paths._path_among_neighbours(cores, batch)
    )


@given(chains(), st.booleans())
def test_costs_are_those_that_opt_einsum_counts_for_the_same_path(chain, few):
    cores, batch = chain
    found = paths._find_path(cores, batch) if few or len(cores) == 1 else searched(cores, batch)
    expected = counted_by_opt_einsum(cores, batch, list(found.path))
    assert found.flops(batch or 0) == expected.opt_cost
    assert found.peak(batch or 0) == expected.largest_intermediate


@given(chains(least_bond=2))
@settings(max_examples=40)
def test_the_search_for_many_cores_hardly_misses_the_best_of_few(chain):
    cores, batch = chain
    if len(cores) > 1:
        best = int(counted_by_opt_einsum(cores, batch, "dp").opt_cost)
        assert best <= searched(cores, batch).flops(batch or 0) <= 1.5 * best


def cost(cores, bonds):
    """Cost of sums over bonds in an order, for chains that share cores: operations and entries."""
    legs = [out * in_ for *_, out, in_, _ in cores]
    inner = [1, *(core[-4] for core in cores[1:]), 1]
    segments, total = [(site, site + 1) for site in range(len(cores))], 0
    for bond in bonds:
        left = next(segment for segment in segments if segment[1] == bond)
        right = next(segment for segment in segments if segment[0] == bond)
        start, stop = left[0], right[1]
        segments = sorted({*segments, (start, stop)} - {left, right})
        copies = max(core[0] if len(core) == 5 else 1 for core in cores[start:stop])
        entries = copies * inner[start] * inner[stop] * prod(legs[start:stop])
        total += entries * (2 * inner[bond] + paths._OPERATIONS_PER_ENTRY)
    return total


def bonds_of(path, sites):
    """The bonds over which a path sums, in its order."""
    remaining, bonds = [(site, site + 1) for site in range(sites)], []
    for step in path:
        left, right = sorted(remaining.pop(term) for term in sorted(step, reverse=True))
        assert left[1] == right[0]
        bonds.append(left[1])
        remaining.append((left[0], right[1]))
    return bonds


@given(chains(most=6), st.data())
@settings(max_examples=60)
def test_chains_that_share_cores_are_built_by_the_best_of_all_orders(chain, data):
    cores, sites = chain[0], len(chain[0])
    owned = data.draw(st.sets(st.integers(0, sites - 1)))
    experts = data.draw(st.integers(1, 64))
    cores = tuple((experts, *core) if site in owned else core for site, core in enumerate(cores))
    found = cost(cores, bonds_of(paths.neighbours_path(cores), sites))
    assert found == min(cost(cores, order) for order in permutations(range(1, sites)))


@given(chains(least_bond=2), st.integers(1, 600))
@settings(max_examples=40)
def test_a_path_shared_between_batches_hardly_misses_the_best_for_one(chain, batch):
    cores, _ = chain
    best = int(counted_by_opt_einsum(cores, batch, "dp").opt_cost)
    assert best <= paths.applying_path(cores, batch).flops(batch) <= 1.2 * best


@pytest.fixture
def searches(monkeypatch):
    """Numbers of operands whose best order was searched for among all."""
    found = []
    contract_path = opt_einsum.contract_path

    def counting(equation, *shapes, **details):
        found.append(len(shapes))
        return contract_path(equation, *shapes, **details)

    monkeypatch.setattr(opt_einsum, "contract_path", counting)
    for module in (paths, plan_module):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    return found


def long_shape(sites, unit):
    """Legs of 2 at eight sites, and of 1 elsewhere; or of 2 all over."""
    if not unit:
        return tn.MPOShape((2,) * sites, (2,) * sites)
    outs, ins = [1] * sites, [1] * sites
    for k in range(8):
        outs[k * sites // 8] *= 2
        ins[(k * sites + sites // 2) // 8] *= 2
    return tn.MPOShape(outs, ins)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sites", [11, 20, 64, 1000])
def test_the_work_to_plan_is_bounded_for_any_number_of_sites(sites, unit, searches, monkeypatch):
    arcs, predecessors = [], paths._predecessors
    monkeypatch.setattr(paths, "_predecessors", lambda *arc: arcs.append(arc) or predecessors(*arc))
    shape = long_shape(sites, unit)
    if shape.out_features >= 2**63:
        with pytest.raises(tn.InputError, match="less than 2\\*\\*63 each"):
            tn.contraction_plan(shape, (4,) * (sites - 1), batch=8)
        return
    plan = tn.contraction_plan(shape, (4,) * (sites - 1), batch=8)
    assert plan.flops > 0
    assert max(searches, default=0) <= 9
    assert len(arcs) <= 32**2


def test_batches_of_many_sizes_share_their_plans(searches):
    shape = tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    for batch in range(1, 257):
        tn.contraction_plan(shape, (8, 8, 8, 8), batch)
        tn.contraction_plan(shape, (8, 8, 8, 8), batch, experts=4)
    assert len(searches) <= 1 + 9  # to build the matrix; for every power of two


def test_more_vectors_never_take_fewer_operations():
    cores = ((1, 4, 3, 8), (8, 4, 4, 16), (16, 8, 4, 8), (8, 6, 4, 1))
    flops = [paths.applying_path(cores, batch).flops(batch) for batch in range(1, 300)]
    assert flops == sorted(flops)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bond", [1, 3])
@pytest.mark.parametrize("sites", [9, 12, 16, 40, 100])
def test_an_operator_of_many_sites_is_the_product_of_its_cores(sites, bond, library):
    shape = long_shape(sites, unit=True)
    mpo = tn.MPO.random(shape, bond, rng=0, like=to_library(np.zeros(()), library))
    matrix = np.ones((1, 1, 1))
    for core in map(to_numpy, mpo.cores):
        matrix = np.einsum("oia,apqb->opiqb", matrix, core)
        matrix = matrix.reshape(prod(matrix.shape[:2]), prod(matrix.shape[2:4]), -1)
    expected = matrix[..., 0]
    np.testing.assert_allclose(to_numpy(mpo.to_matrix()), expected, atol=1e-9)
    for batch in (1, 3, 300):
        x = np.random.default_rng(0).standard_normal((batch, shape.in_features))
        found = to_numpy(mpo.apply(to_library(x, library)))
        np.testing.assert_allclose(found, x @ expected.T, atol=1e-8)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_matrix_of_many_sites_decomposes_into_what_it_was(library):
    shape = long_shape(80, unit=True)
    matrix = np.random.default_rng(0).standard_normal((256, 256))
    mpo = tn.decompose(to_library(matrix, library), shape)
    np.testing.assert_allclose(to_numpy(mpo.to_matrix()), matrix, atol=1e-9)
