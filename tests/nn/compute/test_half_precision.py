"""Half precision: sums over tokens, experts and sites are as good as sums in float32."""

import pytest
import torch

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.compute import matrices as matrices_module
from tnmoe.nn.compute.grouped import grouped_outer
from tnmoe.nn.compute.half_precision import cast_for_reuse
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

HALVES = (torch.bfloat16, torch.float16)
ROUTES = ("joint", "rebuilt", "per_expert")
SHAPES = {
    "two sites": tn.MPOShape((4, 4), (4, 6)),
    "three sites": tn.MPOShape((4, 4, 4), (4, 4, 6)),
    "five sites": tn.MPOShape((2, 2, 3, 2, 2), (2, 2, 2, 2, 2)),
    "split": tn.MPOShape.split(16, 24, 4, 4),
}
# Errors are allowed this many epsilons: results are rounded at a few sites, forwards and backwards.
# A sum that is rounded at every term would be wrong by hundreds of them.
EPSILONS = 2.0


def positive(*shape, seed, dtype):
    """Draw numbers of half precision that do not cancel in sums."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).add_(0.5).div_(shape[-1]).to(dtype)


def relative(error, exact, dtype):
    """Return the size of an error in the dtype's epsilons."""
    return float((error.double() - exact).norm() / exact.norm()) / torch.finfo(dtype).eps


def projections(shape, experts, dtype, shared_sites="center"):
    """Make projections of the same half-precision numbers in that dtype, float32 and float64."""

    def empty(dtype):
        made = MPOProjection(
            experts, shape, bias=True, shared_sites=shared_sites, device="meta", dtype=dtype
        )
        return made.to_empty(device="cpu")

    half, *copies = map(empty, (dtype, torch.float32, torch.float64))
    with torch.no_grad():
        for seed, (_, each) in enumerate(half.named_parameters()):
            each.copy_(positive(*each.shape, seed=seed, dtype=dtype))
    for each in copies:
        each.load_state_dict(half.state_dict())
    return half, *copies


def gradients(made, rows, groups, upstream):
    """Return the output and gradients by name, that of ``rows`` included."""
    leaf = rows.clone().requires_grad_()
    out = made(leaf, groups)
    out.backward(upstream)
    named = {name: each.grad for name, each in made.named_parameters()}
    return {"output": out.detach(), "rows": leaf.grad} | named


def check(shape, route, dtype, tokens, experts, shared_sites="center"):
    """Check the gradients of a half-precision projection, and those under autocast."""
    half, single, double = projections(shape, experts, dtype, shared_sites)
    rows = positive(tokens, shape.in_features, seed=101, dtype=dtype)
    upstream = positive(tokens, shape.out_features, seed=102, dtype=dtype)
    # Scaled so that float16 can hold the sums.
    upstream = (upstream.double() / tokens * 64).to(dtype)
    groups = Groups.of(torch.arange(tokens) * experts // tokens, experts)
    double.route, half.route, single.route = "rebuilt", route, route
    exact = gradients(double, rows.double(), groups, upstream.double())
    found = gradients(half, rows, groups, upstream)
    # As autocast has it: cores of single precision, rows of half precision.
    under_autocast = gradients(single, rows, groups, upstream)
    for name, expected in exact.items():
        assert relative(found[name], expected, dtype) < EPSILONS, name
        assert relative(under_autocast[name], expected, dtype) < EPSILONS, name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SHAPES)
def test_errors_of_half_precision_gradients_do_not_grow_with_the_tokens(name, route, dtype):
    check(SHAPES[name], route, dtype, 4096, experts=3)


# Both dtypes meet every shape and every route, but not where float16 is slowest on a CPU.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "route", "dtype"),
    [
        (name, route, HALVES[(row + column + 1) % 2])
        for row, name in enumerate(SHAPES)
        for column, route in enumerate(ROUTES)
    ],
    ids=str,
)
def test_errors_of_half_precision_gradients_are_small_for_65536_tokens(name, route, dtype):
    check(SHAPES[name], route, dtype, 65536, experts=3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("name", "shared"), [("two sites", "center"), ("split", "center"), ("five sites", [0])]
)
def test_errors_of_half_precision_gradients_do_not_grow_with_the_experts(
    name, route, dtype, shared
):
    check(SHAPES[name], route, dtype, 1024, experts=1024, shared_sites=shared)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_errors_of_half_precision_gradients_do_not_grow_with_the_blocks_of_a_matrix(
    dtype, monkeypatch
):
    monkeypatch.setattr(matrices_module, "_BLOCK", 1)
    check(tn.MPOShape((128, 16, 2), (1, 16, 4)), "rebuilt", dtype, 16, experts=2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sizes", [(32, 8, 4), (8, 32, 20), (256, 512, 2)], ids=str)
def test_outer_products_add_up_in_float32(sizes, dtype):
    out, depth, columns = sizes
    left = torch.full((4096, out, columns), 0.25, dtype=dtype)
    right = torch.full((4096, depth, columns), 0.25, dtype=dtype)
    offsets = torch.tensor([1, 4096], dtype=torch.int32)
    sums = grouped_outer(left, right, offsets)
    expected = torch.tensor([1.0, 4095.0], dtype=torch.float64) * columns / 16
    expected = expected[:, None, None].expand(sums.shape)
    torch.testing.assert_close(sums.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_a_layers_gradients_are_those_of_float64_with_the_same_numbers(route, dtype):
    """Biases, weights of slots and states of tokens included."""
    tokens, experts = 2048, 4
    half = nn.MPOExperts(experts, 12, 16, "silu", gated=True, bias=True, sites=3, dtype=dtype)
    exact = nn.MPOExperts(experts, 12, 16, "silu", gated=True, bias=True, sites=3).double()
    with torch.no_grad():
        for seed, each in enumerate(half.parameters()):
            each.copy_(positive(*each.shape, seed=seed, dtype=dtype))
    exact.load_state_dict(half.state_dict())
    for layer, way in ((half, route), (exact, "rebuilt")):
        for projection in (layer.up, layer.gate, layer.down):
            projection.route = way
    states, weights, upstream = (
        positive(tokens, size, seed=seed, dtype=dtype)
        for seed, size in ((101, 12), (102, 2), (103, 12))
    )
    upstream = (upstream.double() / tokens * 64).to(dtype)
    index = torch.rand(tokens, experts).argsort(1)[:, :2]
    found = []
    for layer, wide in ((half, dtype), (exact, torch.float64)):
        leaves = [each.to(wide, copy=True).requires_grad_() for each in (states, weights)]
        layer(leaves[0], index, leaves[1]).backward(upstream.to(wide))
        found.append([each.grad for each in (*leaves, *layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs, dtype) < EPSILONS


def test_tensors_cast_for_reuse_have_the_derivatives_of_the_tensor_to_any_order():
    core = torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)

    def cubes(core):
        use = cast_for_reuse(core, torch.bfloat16)
        return (use() * use() * use()).sum()

    (first,) = torch.autograd.grad(cubes(core), core, create_graph=True)
    assert first.detach().equal(torch.tensor([0.75, 12.0], dtype=torch.bfloat16))
    (second,) = torch.autograd.grad(first.sum(), core)
    assert second.equal(torch.tensor([3.0, 12.0], dtype=torch.bfloat16))
    assert torch.func.grad(cubes)(core).equal(first.detach())
    tangent = torch.func.jvp(cubes, (core.detach(),), (torch.ones_like(core.detach()),))[1]
    assert float(tangent) == 12.75
