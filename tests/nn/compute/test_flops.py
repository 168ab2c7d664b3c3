"""FlopCounterMode counts what goes through tnmoe's operators as it does other products."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tnmoe as tn
from tests.nn.flop_counting import count_products as count
from tnmoe import nn
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

E, H, F = 4, 16, 32
SITES = {"interleaved": {"sites": 3}}  # split shapes follow from their groups


def routed(top_k, tokens=24, experts=3):
    """Route tokens to the first experts only."""
    torch.manual_seed(0)
    weights, index = torch.rand(tokens, experts).topk(top_k)
    return torch.randn(tokens, H), index, weights


def loop(experts, states, index, weights):
    """Multiply every expert's tokens by its own matrices, with torch's own products."""
    total = torch.zeros_like(states)
    for expert in range(experts.num_experts):
        tokens, choice = torch.where(index == expert)
        if not len(tokens):
            continue

        def project(projection, rows, expert=expert):
            return rows @ projection.weight()[expert].T

        sides = [each for each in (experts.gate, experts.up) if each is not None]
        inner = experts.activation(*(project(side, states[tokens]) for side in sides))
        part = project(experts.down, inner) * weights[tokens, choice, None]
        total = total.index_add(0, tokens, part)
    return total


def backward(call, states, *rest):
    call(states.clone().requires_grad_(), *rest).sum().backward()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_that_own_matrices_take_what_the_loop_over_experts_takes(gated, top_k, bias):
    experts, given = nn.DenseExperts(E, H, F, gated=gated, bias=bias), routed(top_k)
    forward = 2 * (2 + gated) * top_k * 24 * H * F
    with torch.no_grad():
        assert count(lambda: experts(*given)) == count(lambda: loop(experts, *given)) == forward
    trained = count(lambda: backward(experts, *given))
    assert trained == count(lambda: backward(lambda *x: loop(experts, *x), *given)) == 3 * forward


SHAPES = {
    "interleaved": tn.MPOShape((2, 3, 2), (3, 2, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(12, 8, 4, 2),
    "centre first": tn.MPOShape((6, 2), (4, 2)),
    "centre last": tn.MPOShape((2, 6), (2, 4)),
}
ROWS = {0: 3, 2: 4}  # of each expert that has any


def project(name, route):
    torch.manual_seed(0)
    made = MPOProjection(3, SHAPES[name], max_bond=3)
    made.route = route
    return made, Groups.of(torch.tensor([e for e, rows in ROWS.items() for _ in range(rows)]), 3)


def chain(made, rows, groups):
    """Contract every expert's rows with its cores from the right, with torch's own products."""
    results = []
    for expert, block in groups.blocks:
        state = torch.nn.functional.pad(rows[block], (0, made.shape.padded_in - rows.shape[1]))
        count, rest, outs = len(state), made.shape.padded_in, 1
        for core in reversed(made.expert(expert).cores):
            before, out, in_, after = core.shape
            rest //= in_
            state = state.reshape(count * rest, in_ * after, outs).mT.reshape(-1, in_ * after)
            state = state @ core.reshape(before * out, in_ * after).T
            state = state.view(count * rest, outs, before * out).mT
            outs *= out
        results.append(state.reshape(count, outs)[:, : made.out_features])
    return torch.cat(results)


def built(made, rows, groups):
    """Build the matrices of experts that have rows and multiply, with torch's own products."""
    results = []
    for expert, block in groups.blocks:
        cores, one = made.expert(expert).cores, torch.ones(1, 1, 1, 1)
        # The environment of a side without cores is 1; the product with it counts.
        left, right = cores[: made.center_site] or [one], cores[made.center_site + 1 :] or [one]
        matrix = cores[made.center_site]
        for core in reversed(left):
            matrix = core.reshape(-1, core.shape[-1]) @ matrix.reshape(core.shape[-1], -1)
        matrix = matrix.reshape(-1, right[0].shape[0])
        for core in right:
            matrix = matrix.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)
        size = made.shape.padded_out, made.shape.padded_in
        results.append(rows.new_zeros(len(rows[block]), size[1]) @ matrix.reshape(size).T)
    return torch.cat(results)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("route", "same"), [("joint", chain), ("rebuilt", built)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_route_takes_what_its_products_take(name, route, same, grad):
    made, groups = project(name, route)
    rows = torch.randn(len(groups.experts), made.in_features, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        assert count(lambda: made(rows, groups)) == count(lambda: same(made, rows, groups))


@pytest.mark.parametrize("name", SHAPES)
def test_training_through_shared_cores_takes_three_times_the_forward(name):
    made, groups = project(name, "joint")
    rows = torch.randn(len(groups.experts), made.in_features, requires_grad=True)
    forward = count(lambda: made(rows, groups))
    assert count(lambda: made(rows, groups).sum().backward()) == 3 * forward


@pytest.mark.parametrize("frozen", ["nothing", "cores", "rows"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_backward_that_builds_again_is_counted_as_torch_counts_its_products(name, frozen):
    made, groups = project(name, "rebuilt")
    for core in made.parameters():
        core.requires_grad_(frozen != "cores")
    rows = torch.randn(len(groups.experts), made.in_features, requires_grad=frozen != "rows")
    visited, ranks = len(ROWS), sum(ROWS.values())
    center, legs = made.center.numel(), made.cores.legs
    half = 2 * visited * legs.out[0] * legs.in_[0] * center
    entries = legs.out_features * legs.in_features
    whole = 2 * visited * entries * made.center.shape[-1]
    product = 2 * ranks * entries
    expected = {
        "nothing": half + whole + 2 * product + 2 * (half + whole),
        "cores": half + whole + product,
        "rows": half + product + 2 * (half + whole),
    }[frozen]
    with FlopCounterMode(display=False) as counter:
        made(rows, groups).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.tnmoe.rebuilt_linear] == half + whole + product
    assert counts[torch.ops.tnmoe.rebuilt_linear_backward] == expected


@pytest.mark.parametrize("columns", [(), (5,)])
def test_operators_on_groups_take_what_a_product_per_group_takes(columns):
    groups = Groups.of(torch.tensor([0, 0, 2, 3, 3]), 3)  # the last two have no expert
    rows, weight = torch.randn(5, 4, *columns), torch.randn(3, 6, 4)
    products = 2 * 3 * 4 * 6 * (columns[0] if columns else 1)
    assert count(lambda: grouped_linear(rows, weight, groups.offsets)) == products
    with torch.no_grad():
        assert count(lambda: grouped_linear(rows, weight, groups.offsets)) == products
    outer = torch.randn(5, 6, *columns)
    assert count(lambda: grouped_outer(outer, rows, groups.offsets)) == products


def test_kept_matrices_take_one_product():
    made, groups = project("interleaved", "cached")
    rows = torch.randn(len(groups.experts), made.in_features)
    with torch.no_grad():
        made(rows, groups)
        assert count(lambda: made(rows, groups)) == 2 * rows.numel() * made.out_features


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
def test_sizes_without_numbers_are_counted(layout, grad):
    if layout == "dense":
        experts = nn.DenseExperts(E, H, F, device="meta")
    else:
        experts = nn.MPOExperts(E, H, F, layout=layout, **SITES.get(layout, {}), device="meta")
    states, weights = torch.randn(24, H, device="meta"), torch.rand(24, 2, device="meta")
    index = torch.zeros(24, 2, dtype=torch.int64, device="meta")
    with torch.set_grad_enabled(grad):
        found = count(lambda: experts(states, index, weights))
    if layout == "dense":
        assert found == 2 * 2 * 24 * 2 * H * F
    assert found > 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
def test_tensors_that_only_have_sizes_take_what_those_of_the_meta_device_take(layout, top_k, grad):
    def layer(device=None):
        if layout == "dense":
            experts = nn.DenseExperts(E, H, F, device=device)
        else:
            experts = nn.MPOExperts(E, H, F, layout=layout, **SITES.get(layout, {}), device=device)
        made = nn.MPOMoE(nn.TopKRouter(H, E, top_k=top_k, device=device), experts)
        states = torch.randn(24, H, device=device, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            return count(lambda: made(states).sum().backward() if grad else made(states))

    with FakeTensorMode():
        found = layer()
    assert found == layer("meta") > 0
