"""Rows in pieces: bounded memory on every route, and the same results."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import tnmoe as tn
from tests.nn.compute.test_half_precision import EPSILONS, HALVES, gradients, projections, relative
from tests.nn.compute.test_half_precision import positive as positive_numbers
from tnmoe import nn
from tnmoe.contraction import apply as apply_module
from tnmoe.contraction import expert_routes
from tnmoe.contraction import pieces as pieces_module
from tnmoe.contraction import plan as plan_module
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

ROUTES = ("joint", "rebuilt", "per_expert")
SHAPES = {
    "two sites": tn.MPOShape((4, 4), (4, 6)),
    "five sites": tn.MPOShape((2, 2, 3, 2, 2), (2, 2, 2, 2, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(16, 24, 4, 4),
}
# With bonds of 8 the states are eight times as large as rows and results.
WIDE = tn.MPOShape((8, 8, 8), (8, 8, 8))


@pytest.fixture
def limit(monkeypatch):
    """Return a function that sets how many numbers a state may have."""

    def forget():
        plan_module._plan_for_experts.cache_clear()

    def set_limit(numbers):
        monkeypatch.setattr(pieces_module, "STATE_LIMIT", numbers)
        forget()

    yield set_limit
    forget()


def projection(shape, route, experts=3, dtype=torch.float64, **details):
    torch.manual_seed(0)
    made = MPOProjection(experts, shape, bias=True, dtype=dtype, **details)
    torch.nn.init.normal_(made.bias)
    made.route = route
    return made


def results(made, rows, groups):
    """Return the output, all gradients, and the gradients of a sum of these."""
    leaf = rows.clone().requires_grad_()
    inputs = [leaf, *made.parameters()]
    out = made(leaf, groups)
    first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(each.sin().sum() for each in first), inputs)
    return [out, *first, *second]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("numbers", [1, 300])
def test_outputs_and_derivatives_are_those_without_pieces(name, route, numbers, limit):
    made = projection(SHAPES[name], route)
    rows = torch.randn(13, made.in_features, dtype=torch.float64)
    groups = Groups.of(torch.tensor([0] * 5 + [2] * 8), 3)
    whole = results(made, rows, groups)
    with torch.no_grad():
        at_inference = made(rows, groups)
    limit(numbers)
    for ours, theirs in zip(results(made, rows, groups), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(made(rows, groups), at_inference)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("route", ROUTES)
def test_layers_with_tied_cores_and_slots_without_an_expert_do_as_well(route, layout, limit):
    torch.manual_seed(0)
    layer = nn.MPOExperts(
        4, 8, 12, "silu", gated=True, bias=True, layout=layout, dtype=torch.float64
    )
    layer.gate.set_core(layer.up.shape.sites - 1, layer.up.aux[-1])
    for each in (layer.up, layer.gate, layer.down):
        each.route = route
    states, weights = torch.randn(10, 8).double(), torch.rand(10, 2).double()
    index = torch.randint(0, 5, (10, 2))
    found = []
    for numbers in (pieces_module.STATE_LIMIT, 1):
        limit(numbers)
        layer.zero_grad()
        out = layer(states, index, weights)
        out.square().sum().backward()
        with torch.no_grad():
            found.append(
                [out, layer(states, index, weights), *(p.grad for p in layer.parameters())]
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def peak_bytes(function):
    """Measure the most bytes that a function has allocated at a time, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = function()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    del kept
    return max(accumulate(changes))


@pytest.mark.parametrize("route", [*ROUTES, "cached"])
def test_memory_does_not_grow_with_the_rows_but_for_what_goes_in_and_out(route, limit):
    """Twice the rows take memory for twice the rows and results, but not for twice the states."""
    limit(1 << 16)
    made = projection(WIDE, route, dtype=torch.float32, max_bond=8)

    def peaks(count):
        rows = torch.randn(count, made.in_features, requires_grad=True)
        groups = Groups.of(torch.arange(count) * 3 // count, 3)

        def train():
            made.zero_grad()
            rows.grad = None
            made(rows, groups).sum().backward()

        def infer():
            with torch.no_grad():
                return made(rows, groups)

        functions = [infer] if route == "cached" else [infer, train]
        for function in functions:
            function()
        return [peak_bytes(function) for function in functions]

    few, many = 256, 2048
    # Ten arrays of float32 as large as the rows.
    allowed = 10 * 4 * (many - few) * WIDE.padded_in
    for small, large in zip(peaks(few), peaks(many), strict=True):
        assert large - small < allowed


def test_states_are_as_large_as_allowed_and_no_larger(limit, monkeypatch):
    from tnmoe.nn.compute import joint as joint_module

    limit(1 << 16)
    made, sizes = projection(WIDE, "joint", dtype=torch.float32, max_bond=8), []
    multiply = joint_module._multiply

    def watched(state, *inputs):
        result = multiply(state, *inputs)
        sizes.append(max(state.numel(), result.numel()))
        return result

    monkeypatch.setattr(joint_module, "_multiply", watched)
    rows = torch.randn(100, made.in_features, requires_grad=True)
    out = made(rows, Groups.of(torch.arange(100) // 34, 3))
    pieces = -(-100 * 4096 // (1 << 16))
    assert len(sizes) == pieces * WIDE.sites
    assert max(sizes) == 1 << 16
    # The backward computes all products again but the last, whose result it does not need.
    out.sum().backward()
    assert len(sizes) <= 2 * pieces * WIDE.sites


def test_few_rows_and_any_number_with_split_shapes_are_computed_at_once(limit, monkeypatch):
    from tnmoe.nn.compute import pieces

    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(pieces, "checkpoint", refuse)
    groups = Groups.of(torch.tensor([0, 1, 2]), 3)
    for shape in (WIDE, SHAPES["split"]):
        made = projection(shape, "joint")
        made(torch.randn(3, made.in_features).double(), groups).sum().backward()
        limit(1)
    made = projection(WIDE, "joint")
    rows = torch.randn(3, made.in_features).double()
    with pytest.raises(AssertionError, match="again"):
        made(rows, groups)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_half_precision_add_up_over_pieces(route, dtype, limit):
    shape, tokens = SHAPES["five sites"], 300
    half, single, double = projections(shape, 2, dtype)
    rows = positive_numbers(tokens, shape.in_features, seed=101, dtype=dtype)
    upstream = positive_numbers(tokens, shape.out_features, seed=102, dtype=dtype)
    groups = Groups.of(torch.arange(tokens) * 2 // tokens, 2)
    double.route, half.route, single.route = "rebuilt", route, route
    exact = gradients(double, rows.double(), groups, upstream.double())
    limit(1)
    for made in (half, single):
        found = gradients(made, rows, groups, upstream)
        for name, expected in exact.items():
            assert relative(found[name], expected, dtype) < EPSILONS, name


@pytest.mark.parametrize("route", ROUTES)
def test_pieces_are_differentiated_by_torch_func_and_checkpointed(route, limit):
    made = projection(SHAPES["five sites"], route)
    rows = torch.randn(9, made.in_features, dtype=torch.float64)
    groups = Groups.of(torch.arange(9) // 3, 3)

    def loss(rows):
        return made(rows, groups).sin().sum()

    expected = torch.func.grad(loss)(rows)
    limit(40)
    torch.testing.assert_close(torch.func.grad(loss)(rows), expected)
    tangent = torch.func.jvp(loss, (rows,), (torch.ones_like(rows),))[1]
    torch.testing.assert_close(tangent, expected.sum())
    leaf = rows.clone().requires_grad_()
    checkpoint(loss, leaf, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_pieces_compile_without_a_graph_break(dtype, limit):
    limit(400)
    layer = nn.MPOExperts(4, 8, 12, "silu", sites=3, dtype=dtype)
    layer.up.route = layer.down.route = "joint"
    states, weights = torch.randn(10, 8, dtype=dtype), torch.rand(10, 2, dtype=dtype)
    index = torch.randint(0, 4, (10, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (layer, compiled):
        layer.zero_grad()
        out = function(states, index, weights)
        out.sum().backward()
        with torch.no_grad():
            found.append(
                [out, function(states, index, weights), *(p.grad for p in layer.parameters())]
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_at_inference_nothing_between_the_projections_grows_with_the_tokens(limit):
    limit(1 << 14)
    layer = nn.DenseExperts(2, 16, 1024)

    def peak(tokens):
        states = torch.randn(tokens, 16)
        index, weights = torch.randint(0, 2, (tokens, 1)), torch.rand(tokens, 1)
        with torch.no_grad():
            return peak_bytes(lambda: layer(states, index, weights))

    few, many = 2048, 8192
    assert peak(many) - peak(few) < 16 * 4 * (many - few) * 16


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_operators_are_applied_in_pieces_of_a_batch(library, limit, monkeypatch):
    shape = WIDE
    operator = tn.MPO.random(shape, max_bond=4, rng=0)
    batch = np.random.default_rng(0).standard_normal((500, shape.in_features))
    if library == "torch":
        operator = tn.MPO([torch.from_numpy(core) for core in operator.cores], shape)
        batch = torch.from_numpy(batch)
    expected, sizes = operator.apply(batch), []
    limit(1 << 15)
    at_once = apply_module._apply_at_once
    monkeypatch.setattr(
        apply_module,
        "_apply_at_once",
        lambda *inputs: sizes.append(len(inputs[3])) or at_once(*inputs),
    )
    np.testing.assert_allclose(np.asarray(operator.apply(batch)), np.asarray(expected))
    assert len(sizes) > 1
    assert sum(sizes) == 500
    plans = [tn.contraction_plan(shape, operator.bond_dims, size) for size in sizes]
    assert all(plan.peak_elements <= 1 << 15 for plan in plans)


@pytest.mark.parametrize("route", ["joint", "per_expert"])
def test_plans_mention_pieces(route, limit, monkeypatch):
    monkeypatch.setattr(expert_routes, "_rebuilt_seconds", lambda *_: 1e9)
    monkeypatch.setattr(expert_routes, f"_{route}_seconds", lambda *_: 1.0)

    def peak(numbers):
        limit(numbers)
        plan = tn.contraction_plan(WIDE, (4, 4), 10**5, experts=2, training=True)
        assert plan.route == route
        return plan.peak_elements

    assert peak(1 << 40) > 1 << 20
    assert 1 << 19 < peak(1 << 20) <= 1 << 20


def test_plans_for_one_operator_mention_pieces_too(limit):
    def peak(numbers):
        limit(numbers)
        plan = tn.contraction_plan(tn.MPOShape((8,) * 4, (8,) * 4), (2, 2, 2), 10**5)
        assert plan.route == "chain"
        return plan.peak_elements

    assert peak(1 << 27) <= 1 << 27 < peak(1 << 40)


@pytest.mark.parametrize("bonds", [(5, 5), (2, 3)])
def test_plans_are_made_for_no_vectors_whose_cores_alone_are_larger_than_the_matrix(bonds):
    """A sum that has not been compressed has such bonds."""
    plan = tn.contraction_plan(tn.MPOShape((1, 2, 1), (1, 1, 1)), bonds, 0)
    assert plan.peak_elements > 2


@pytest.mark.parametrize("rows", [10, 10**6])
def test_what_is_computed_again_is_part_of_the_predicted_time(rows, limit):
    def seconds(numbers):
        limit(numbers)
        return tn.contraction_plan(WIDE, (8, 8), rows, experts=2, training=True).seconds["joint"]

    assert seconds(1) > 1.1 * seconds(1 << 60)
