"""The plan of a placement says what ranks send when they train, and chooses by it."""

from itertools import combinations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.nn.flop_counting import count_products
from tests.nn.parallel.traffic import Traffic
from tests.nn.ranks import on_ranks
from tnmoe import nn
from tnmoe.errors import InputError
from tnmoe.nn.parallel import expert_placement, shard_experts

HIDDEN, INNER = 16, 32
LAYOUTS = ("dense", "hidden", "residual")
KINDS = ("replicated", "gathered", "spread")
MESHES = {2: ((1, 2),), 4: ((1, 4), (2, 2))}


def experts_of(layout, experts=8, **settings):
    sizes = (experts, HIDDEN, INNER)
    if layout == "dense":
        return nn.DenseExperts(*sizes, gated=True, bias=True, **settings)
    return nn.MPOExperts(*sizes, gated=True, bias=True, layout=layout, **settings)


def all_choices(experts, top_k):
    """Return a token for every set of experts, so that loads are exactly as the plan assumes."""
    return torch.tensor(list(combinations(range(experts), top_k)))


def random_choices(rank):
    draw = torch.Generator().manual_seed(rank)
    return torch.rand(500, 8, generator=draw).topk(3).indices


def plan_of(experts, shape, index, **options):
    replicas, ranks = shape
    found = expert_placement(
        experts, ranks, tokens=len(index), top_k=index.shape[1], replicas=replicas,
        bandwidth=1e9, **options,
    )  # fmt: skip
    return {each.kind: each for each in found.placements}


def placed(experts, kind, mesh):
    """Let owned tensors lie as a placement says. Shared ones, which it leaves out, stay as is."""
    if kind == "spread":
        shard_experts(experts, mesh)
        return experts
    shared = set(nn.shared_parameters(experts))
    for parameter in shared:
        parameter.requires_grad_(False)
    if kind == "replicated":
        return DistributedDataParallel(experts)
    mesh = mesh if mesh.shape[0] > 1 else mesh["ep"]
    return fully_shard(experts, mesh=mesh, reshard_after_forward=True, ignored_params=shared)


def count(experts, kind, mesh, index, training=True):
    """Return the bytes, collectives and operations of a step of the layer."""
    wrapped = placed(experts, kind, mesh)
    states = torch.randn(len(index), HIDDEN, requires_grad=training)
    weights = torch.rand(index.shape, requires_grad=training)

    def step():
        with torch.set_grad_enabled(training):
            outputs = wrapped(states, index, weights)
        if training:
            outputs.square().mean().backward()

    # In the first steps, DistributedDataParallel agrees with all ranks on the order of its buckets.
    for _ in range(2):
        step()
    with Traffic() as traffic:
        step()
    return traffic.sent, traffic.calls, count_products(step)


def run(rank):
    found = {}
    for shape in MESHES[torch.distributed.get_world_size()]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        for layout in LAYOUTS:
            for kind in KINDS:
                for training in (True, False) if kind == "spread" else (True,):
                    case = shape, layout, kind, training
                    found[case] = count(experts_of(layout), kind, mesh, all_choices(8, 3), training)
        found[shape, "random"] = count(experts_of("hidden"), "spread", mesh, random_choices(rank))
    return found


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, run)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_send_what_the_plan_says(two, layout, kind):
    compare(two, (1, 2), layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES[4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_send_what_the_plan_says(four, shape, layout, kind):
    compare(four, shape, layout, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_send_and_compute_what_the_plan_says_at_inference(two, layout):
    compare(two, (1, 2), layout, "spread", training=False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES[4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_send_and_compute_what_the_plan_says_at_inference(four, shape, layout):
    compare(four, shape, layout, "spread", training=False)


def test_two_ranks_with_random_choices_send_about_what_the_plan_says(two):
    compare_random(two, (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES[4])
def test_four_ranks_with_random_choices_send_about_what_the_plan_says(four, shape):
    compare_random(four, shape)


def compare(ranks, shape, layout, kind, training=True):
    plan = plan_of(experts_of(layout), shape, all_choices(8, 3), training=training)[kind]
    for found in ranks:
        sent, rounds, operations = found[shape, layout, kind, training]
        assert sent == pytest.approx(plan.sent_bytes, rel=1e-12)
        assert rounds == plan.rounds
        # A backward pass may compute parts of the forward pass again, and needs no derivatives by
        # the inputs of a frozen module.
        if not training:
            assert operations == pytest.approx(plan.flops, rel=1e-12)


def compare_random(ranks, shape):
    plan = plan_of(experts_of("hidden"), shape, random_choices(0))["spread"]
    for found in ranks:
        assert found[shape, "random"][0] == pytest.approx(plan.sent_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"),
    [(4, 1, 2), (4, 2, 2), (4, 4, 4), (8, 3, 2), (8, 3, 8), (8, 7, 4), (12, 2, 3)],
)
def test_rows_to_other_ranks_are_those_of_all_sets_of_experts(experts, top_k, ranks):
    index = all_choices(experts, top_k)
    pairs = [len({each // (experts // ranks) for each in row} - {0}) for row in index.tolist()]
    layer = experts_of("hidden", experts, device="meta")
    plan = plan_of(layer, (1, ranks), index, training=False)["spread"]
    row = 4 * (2 * HIDDEN + top_k) + 8 * top_k
    assert plan.sent_bytes == pytest.approx(sum(pairs) * row + 8 * (ranks - 1), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_rank_sends_nothing(layout):
    plan = plan_of(experts_of(layout), (1, 1), all_choices(8, 3))
    assert [each.sent_bytes for each in plan.values()] == [0, 0, 0]
    operations = {each.flops for each in plan.values()}
    assert len(operations) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_meta_device_gives_the_same_plan(layout):
    index = all_choices(8, 3)
    real, meta = (
        plan_of(experts_of(layout, device=device), (2, 4), index) for device in ("cpu", "meta")
    )
    assert real == meta


def test_bytes_held_are_those_of_owned_tensors_and_their_copies():
    layer = experts_of("hidden", device="meta")
    shared = set(nn.shared_parameters(layer))
    owned = 4 * sum(each.numel() for each in layer.parameters() if each not in shared)
    held = {
        training: [
            each.held_bytes
            for each in plan_of(layer, (1, 4), all_choices(8, 3), training=training).values()
        ]
        for training in (True, False)
    }
    assert held[True] == [4 * owned, 4 * owned / 4 + 2 * owned, 4 * owned / 4]
    assert held[False] == [owned, owned / 4 + owned, owned / 4]


def test_the_best_placement_is_the_fastest_that_fits():
    layer = experts_of("dense", device="meta")
    options = {"tokens": 8, "top_k": 1, "bandwidth": 1e9}
    plan = expert_placement(layer, 8, **options)
    replicated, gathered, spread = plan.placements
    fastest = min(plan.placements, key=lambda each: each.seconds)
    assert plan.best == fastest
    for memory in (replicated.held_bytes, gathered.held_bytes, spread.held_bytes):
        best = expert_placement(layer, 8, memory=memory, **options).best
        fitting = [each for each in plan.placements if each.held_bytes <= memory]
        assert best == min(fitting, key=lambda each: each.seconds)


def test_the_smallest_placement_is_best_if_none_fits():
    plan = expert_placement(
        experts_of("residual", device="meta"), 8, tokens=10**6, top_k=8, bandwidth=1e9, memory=1.0
    )
    assert plan.best.kind == "spread"
    assert str(plan).count("too large") == 3


def test_seconds_are_bytes_rounds_and_operations_over_their_rates():
    options = {"tokens": 100, "top_k": 2, "bandwidth": 1e6, "latency": 0.5, "rate": 1e3}
    plan = expert_placement(experts_of("hidden", device="meta"), 4, replicas=2, **options)
    for each in plan.placements:
        expected = each.sent_bytes / 1e6 + each.rounds / 2 + each.flops / 1e3
        assert each.seconds == pytest.approx(expected, rel=1e-12)


def test_what_experts_share_acts_once_for_every_rank_that_a_token_visits():
    layer = experts_of("hidden", device="meta")
    call = layer.plan(56, 3)
    plan = plan_of(layer, (1, 8), all_choices(8, 3))
    once, slots = call.flops_per("token"), call.flops_per("slot")
    assert plan["replicated"].flops == plan["gathered"].flops == 3 * (once + slots)
    assert plan["spread"].flops == pytest.approx(3 * (3 * once + slots), rel=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": 3}, "3 ranks do not divide the number of experts, 8"),
        ({"ranks": 16}, "16 ranks do not divide the number of experts, 8"),
        ({"ranks": 0}, "ranks"),
        ({"top_k": 9}, "top_k=9 exceeds the number of experts, 8"),
        ({"top_k": 0}, "top_k"),
        ({"tokens": -1}, "tokens"),
        ({"replicas": 0}, "replicas"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": float("nan")}, "bandwidth"),
        ({"latency": -1.0}, "latency"),
        ({"rate": 0.0}, "rate"),
        ({"memory": -1.0}, "memory"),
        ({"training": "yes"}, "training"),
    ],
)
def test_bad_input_is_refused(changed, message):
    options = {"ranks": 2, "tokens": 8, "top_k": 2, "bandwidth": 1e9} | changed
    with pytest.raises(InputError, match=message):
        expert_placement(experts_of("hidden", device="meta"), **options)
