"""Every route computes what the experts' dense matrices do, forwards and backwards."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tnmoe as tn
from tnmoe import nn
from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute import rebuilt as rebuilt_module
from tnmoe.nn.compute.cache import weight_cache
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer, spread
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.compute.rebuilt import build
from tnmoe.nn.mpo_projection import MPOProjection

SHAPES_TO_CACHE = tn.MPOShape((4, 4, 4), (4, 4, 4))

ROUTES = ("rebuilt", "joint", "per_expert", "cached")
SHAPES = {
    "interleaved": tn.MPOShape((2, 3, 2), (3, 2, 2)),
    "five sites": tn.MPOShape((2, 1, 3, 2, 2), (1, 2, 2, 3, 2)),
    "padded": tn.MPOShape((2, 3, 2), (3, 2, 2), 11, 10),
    "split": tn.MPOShape.split(12, 8, 4, 2),
    "two sites a side": tn.MPOShape((2, 2, 3, 1, 1), (1, 1, 2, 2, 2)),
    "centre first": tn.MPOShape((6, 2), (4, 2)),
    "centre last": tn.MPOShape((2, 6), (2, 4)),
}


def projection(name="interleaved", experts=3, max_bond=None, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    made = MPOProjection(
        experts, SHAPES.get(name, name), bias=bias, max_bond=max_bond, dtype=dtype
    )
    if bias:
        torch.nn.init.normal_(made.bias)
    return made


def grouped(index, experts):
    return Groups.of(torch.as_tensor(index, dtype=torch.int64), experts)


def one_by_one(projection, rows, index):
    """The definition: every row times its own expert's dense matrix."""
    matrices = torch.stack(
        [projection.to_shared_mpo().expert(e).to_matrix() for e in range(projection.num_experts)]
    )
    result = torch.einsum("toi,ti->to", matrices[index], rows)
    return result if projection.bias is None else result + projection.bias[index]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.sampled_from((None, 1, 2)), st.booleans())
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_route_gives_every_row_its_own_experts_product(route, name, index, max_bond, bias):
    made = projection(name, max_bond=max_bond, bias=bias)
    made.route = route
    index = torch.tensor(sorted(index), dtype=torch.int64)
    rows = torch.randn(len(index), made.in_features, dtype=torch.float64)
    with torch.no_grad():
        result = made(rows, grouped(index, 3))
        torch.testing.assert_close(result, one_by_one(made, rows, index))


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("index", [[0, 0, 2, 2, 2], [1, 1, 1, 1, 1]])
def test_gradients_of_a_route_agree_with_finite_differences(route, name, index):
    made = projection(name, max_bond=2, bias=True)
    made.route = route
    rows = torch.randn(5, made.in_features, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters()]

    def function(rows, *cores):
        cores = dict(zip(names, cores, strict=True))
        for core, value in cores.items():
            holder, _, last = core.rpartition(".")
            module = made.get_submodule(holder)
            module._parameters[last] = value
        return made(rows, grouped(index, 3))

    cores = [core.detach().clone().requires_grad_() for core in made.parameters()]
    assert torch.autograd.gradcheck(function, (rows, *cores))


@pytest.mark.parametrize("route", ["rebuilt", "joint"])
def test_gradients_are_those_of_the_dense_matrices_where_only_some_are_wanted(route):
    for frozen in ("center", "aux_0", "rows"):
        gradients = []
        for way in (route, None):
            made = projection(dtype=torch.float32)
            made.route = route
            rows = torch.randn(
                4, made.in_features, generator=torch.Generator().manual_seed(1)
            ).requires_grad_(frozen != "rows")
            for name, core in made.named_parameters():
                core.requires_grad_(name != frozen)
            index = torch.tensor([0, 1, 1, 2])
            result = made(rows, grouped(index, 3)) if way else one_by_one(made, rows, index)
            result.square().sum().backward()
            gradients.append([each.grad for each in (rows, *made.parameters())])
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("piece", [1, 40, 10**9])
@pytest.mark.parametrize("name", SHAPES)
def test_pieces_of_any_size_make_the_same_matrices_and_gradients(name, piece, monkeypatch):
    monkeypatch.setattr(rebuilt_module, "_PIECE", piece)
    made = projection(name)
    made.route = "rebuilt"
    rows = torch.randn(5, made.in_features, dtype=torch.float64)
    check_against_dense_matrices(made, rows, [0, 0, 0, 2, 2])
    matrices = torch.stack([made.to_shared_mpo().expert(e).to_matrix() for e in range(3)])
    made.route = "cached"
    with torch.no_grad():
        result = made(rows, grouped([0, 0, 1, 1, 2], 3))
        torch.testing.assert_close(
            result, torch.einsum("toi,ti->to", matrices[[0, 0, 1, 1, 2]], rows)
        )


@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 900)
)
def test_pieces_cover_a_matrix_and_hold_no_more_than_they_may_or_one_leg(out, in_, most):
    legs = rebuilt_module.Legs(out, in_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilt_module, "_PIECE", most)
        pieces = list(rebuilt_module.MatrixBuilder(torch.ones(2, out[1], in_[1], 2), legs).pieces())
    assert [index for part, _ in pieces for index in range(out[0])[part]] == list(range(out[0]))
    features = range(legs.out_features)
    assert [row for _, rows in pieces for row in features[rows]] == list(features)
    one = out[1] * out[2] * legs.in_features
    # All of about the same size, which may be one leg more than would fit.
    assert all(len(range(out[0])[part]) * one < most + one for part, _ in pieces)


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_of_all_experts_at_once_do_as_well_as_one_after_the_other(name, monkeypatch):
    # What an accelerator does, where nothing may be waited for.
    monkeypatch.setattr(rebuilt_module, "_turns", lambda offsets: [(slice(None), slice(None))])
    made = projection(name)
    made.route = "rebuilt"
    rows = torch.randn(5, made.in_features, dtype=torch.float64)
    check_against_dense_matrices(made, rows, [0, 0, 0, 2, 2])


@pytest.mark.parametrize("route", ["rebuilt", "joint"])
@pytest.mark.parametrize(
    "shape", [tn.MPOShape((4, 4, 4), (4, 4, 4)), tn.MPOShape.split(32, 48, 4, 8)], ids=str
)
def test_grouped_kernels_do_as_well_as_loops(shape, route, monkeypatch):
    # The operators that CUDA uses; torch has them on a CPU, too.
    monkeypatch.setattr(rebuilt_module, "_turns", lambda offsets: [(slice(None), slice(None))])
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    monkeypatch.setattr(grouped_module, "_has_kernel", lambda *arrays: True)
    made = projection(shape, dtype=torch.float32)
    made.route = route
    rows = torch.randn(5, made.in_features)
    check_against_dense_matrices(made, rows, [0, 0, 0, 2, 2])


def test_kernels_want_rows_of_whole_16_bytes_in_either_order(monkeypatch):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    fits = grouped_module._has_kernel
    rows = torch.zeros(3, 16, dtype=torch.bfloat16)
    weight = torch.zeros(2, 24, 16, dtype=torch.bfloat16)
    assert fits(rows, weight)
    assert fits(torch.zeros(3, 24, dtype=torch.bfloat16), weight.mT)
    assert not fits(rows.float(), weight.float())
    assert not fits(rows[:, :12], weight[..., :12])
    assert not fits(rows, weight[:, ::3])


def check_against_dense_matrices(made, rows, index):
    """Outputs and all gradients."""
    results, index = [], torch.tensor(index)
    for way in (lambda x: made(x, grouped(index, 3)), lambda x: one_by_one(made, x, index)):
        made.zero_grad()
        leaf = rows.clone().requires_grad_()
        out = way(leaf)
        out.square().sum().backward()
        results.append(
            [out.detach(), leaf.grad, *(each.grad.clone() for each in made.parameters())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_cores_are_kept_for_the_backward_and_only_experts_with_rows_are_built(monkeypatch):
    torch.manual_seed(0)
    made = MPOProjection(6, tn.MPOShape((4, 8, 4), (4, 8, 4)), max_bond=8)
    made.route = "rebuilt"
    kept, built = [], []
    halves = rebuilt_module.MatrixBuilder.halves
    monkeypatch.setattr(
        rebuilt_module.MatrixBuilder,
        "halves",
        lambda self, left: built.append(left) or halves(self, left),
    )
    rows = torch.randn(3, made.in_features, requires_grad=True)

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(rows, grouped([1, 4, 4], 6)).sum().backward()
    assert len(built) == 2 * 2  # forwards, and again backwards
    assert max(kept) < made.in_features * made.out_features
    assert sum(kept) < 3 * sum(each.numel() for each in (rows, *made.parameters()))


def test_auxiliary_cores_are_found_under_a_parametrization():
    made = projection()
    torch.nn.utils.parametrize.register_parametrization(made, "aux_0", torch.nn.Tanh())
    made.route = "joint"
    rows, index = torch.randn(2, made.in_features, dtype=torch.float64), torch.tensor([0, 2])
    torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


@given(st.lists(st.integers(0, 4), max_size=20))
def test_groups_sort_slots_stably_and_find_their_way_back(index):
    slots = torch.tensor(index, dtype=torch.int64)
    groups = Groups.of(slots, 5)
    assert torch.equal(slots[groups.order], slots.sort(stable=True).values)
    assert torch.equal(slots[groups.order][groups.inverse], slots)
    assert torch.equal(groups.experts, slots[groups.order])
    assert groups.offsets.tolist() == torch.bincount(slots, minlength=5).cumsum(0).tolist()
    assert [block.stop - block.start for _, block in groups.spans] == [
        count for count in torch.bincount(slots, minlength=5).tolist() if count
    ]


def test_grouped_products_are_closed_under_differentiation():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    for function, inputs in (
        (lambda a, b: grouped_linear(a, b, offsets), (rows, weight)),
        (lambda a, b: grouped_outer(a, b, offsets), (other, rows)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    torch.library.opcheck(
        torch.ops.tnmoe.grouped_linear, (rows, weight, offsets), raise_exception=True
    )
    torch.library.opcheck(
        torch.ops.tnmoe.grouped_outer, (other, rows, offsets), raise_exception=True
    )


@pytest.mark.parametrize(("depth", "columns"), [(3, 2), (5, 20), (400, 17)])
def test_grouped_products_of_matrices_multiply_their_columns(depth, columns):
    # Narrow and wide ones, and matrices too large for several to stay in a cache, differ inside.
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([0, 0, 2, 2, 2, 3])
    offsets = Groups.of(index, 4).offsets
    rows, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((6, depth, columns), (4, depth + 1, depth))
    )
    expected = weight[index] @ rows
    torch.testing.assert_close(grouped_linear(rows, weight, offsets), expected)
    outer = torch.stack(
        [torch.einsum("tmn,tkn->mk", expected[index == e], rows[index == e]) for e in range(4)]
    )
    torch.testing.assert_close(grouped_outer(expected, rows, offsets), outer)
    if depth < 400:
        both = rows.requires_grad_(), weight.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *each: grouped_linear(*each, offsets), both, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(
            lambda *each: grouped_linear(*each, offsets), both, fast_mode=True
        )


@pytest.mark.parametrize("choices", [1, 3])
def test_spreading_tokens_over_slots_is_indexing_and_differentiates_as_it(choices):
    order = torch.randperm(4 * choices, generator=torch.Generator().manual_seed(0))
    inverse = order.argsort()
    states = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert spread(states, order, inverse, choices).equal(states[order // choices])
    assert torch.autograd.gradcheck(lambda x: spread(x, order, inverse, choices), (states,))
    assert torch.autograd.gradgradcheck(lambda x: spread(x, order, inverse, choices), (states,))


def test_experts_that_take_turns_compute_what_they_do_together(monkeypatch):
    layer = experts("rebuilt")
    states, index, weights = routing()
    index[index == 2] = 0  # an expert without rows, another chosen twice
    with torch.no_grad():
        together = layer(states, index, weights)
        monkeypatch.setattr("tnmoe.nn.experts._CACHED", 0)
        torch.testing.assert_close(layer(states, index, weights), together)


def test_experts_that_take_turns_go_the_way_that_is_planned_for_all_of_them(monkeypatch):
    layer, planned = experts(None), []
    plan = MPOProjection.plan
    monkeypatch.setattr("tnmoe.nn.experts._CACHED", 0)
    monkeypatch.setattr(
        MPOProjection, "plan", lambda self, rows, training: planned.append(rows) or
        plan(self, rows, training)
    )  # fmt: skip
    states, index, weights = routing(tokens=40)
    with torch.no_grad():
        layer(states, index, weights)
    assert set(planned) == {index.numel()}


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_cores_that_gate_and_up_share_are_applied_once_and_get_the_gradients_of_both(
    layout, monkeypatch
):
    from tnmoe.nn.compute import joint as joint_module

    layer, tied = experts("joint", torch.float64, layout=layout), []
    layer.gate.set_core(layer.up.shape.sites - 1, layer.up.aux[-1])
    products = []
    multiply = joint_module._multiply
    monkeypatch.setattr(joint_module, "_multiply", lambda *a: products.append(a) or multiply(*a))
    states, index, weights = (
        each.double() if each.is_floating_point() else each for each in routing()
    )
    for route in ("joint", "rebuilt"):
        for module in (layer.up, layer.gate, layer.down):
            module.route = route
        layer.zero_grad()
        out = layer(states, index, weights)
        out.square().sum().backward()
        tied.append([out.detach(), *(each.grad.clone() for each in layer.parameters())])
    assert len(products) == 3 * layer.up.shape.sites - 1
    for ours, theirs in zip(*tied, strict=True):
        torch.testing.assert_close(ours, theirs)


def experts(route, dtype=torch.float32, gated=True, **details):
    torch.manual_seed(0)
    layer = nn.MPOExperts(4, 8, 12, "silu", gated=gated, bias=True, sites=3, dtype=dtype, **details)
    for module in layer.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return layer


def routing(tokens=10, top_k=2, experts=4):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, 8, generator=generator), index, weights


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision_and_keeps_gradients_in_that_of_the_cores(route, dtype):
    states, index, weights = routing()
    layer = experts(route)
    expected = layer(states, index, weights)
    with torch.autocast("cpu", dtype):
        result = layer(states, index, weights)
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    result.square().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in layer.parameters())
    assert all(torch.isfinite(each.grad).all() for each in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_are_kept_in_the_precision_of_autocast_and_built_in_their_cores(dtype, cache):
    torch.manual_seed(0)
    layer = nn.MPOExperts(4, 64, 256)
    for module in (layer.up, layer.down):
        module.route = "cached"
    index, weights = torch.randint(0, 4, (8, 2)), torch.rand(8, 2)
    states = torch.randn(8, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        result = layer(states, index, weights)
    up = torch.stack([layer.up.to_shared_mpo().expert(e).to_matrix() for e in range(4)])
    kept = [entry.matrices for entry in cache._entries.values()]
    assert {each.dtype for each in kept} == {dtype}
    torch.testing.assert_close(kept[0], up.detach().to(dtype), rtol=0.01, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(result, layer(states, index, weights), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
def test_activation_checkpointing_gives_the_same_gradients(route):
    states, index, weights = routing()
    gradients = []
    for through in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        layer = experts(route)
        inputs = states.clone().requires_grad_()
        through(layer, inputs, index, weights).square().sum().backward()
        gradients.append([inputs.grad, *(each.grad for each in layer.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_function_transforms_see_the_layer_they_transform():
    layer = experts(None, torch.float64)
    states, index, weights = (
        each.double() if each.is_floating_point() else each for each in routing()
    )
    parameters = dict(layer.named_parameters())

    def loss(parameters, states, index, weights):
        out = torch.func.functional_call(layer, parameters, (states, index, weights))
        return out.square().sum()

    found = torch.func.grad(loss)(parameters, states, index, weights)
    loss(parameters, states, index, weights).backward()
    for name, each in layer.named_parameters():
        torch.testing.assert_close(found[name], each.grad)
    per_batch = torch.func.vmap(layer)(
        states.view(2, 5, 8), index.view(2, 5, 2), weights.view(2, 5, 2)
    )
    torch.testing.assert_close(per_batch.view(10, 8), layer(states, index, weights))


def test_states_of_another_dtype_are_taken_under_function_transforms_too():
    layer = experts(None, torch.float32)
    states, index, weights = routing()
    states = states.double()
    found = torch.func.vmap(layer)(states.view(2, 5, 8), index.view(2, 5, 2), weights.view(2, 5, 2))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.view(10, 8), layer(states, index, weights))


@pytest.fixture
def compiler():
    """A compiler that knows nothing of other tests: it gives up after so many compilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def cache():
    weight_cache.clear()
    limit = weight_cache.limit
    yield weight_cache
    weight_cache.enabled, weight_cache.limit = True, limit
    weight_cache.clear()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("route", ["rebuilt", "joint", None])
def test_compiled_without_a_graph_break_it_computes_the_same(route, layout):
    layer = experts(route, layout=layout)
    states, index, weights = routing()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        out = function(states, index, weights)
        out.square().sum().backward()
        results.append([out.detach(), *(each.grad.clone() for each in layer.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(states, index, weights), results[0][0])
        more = routing(tokens=13)
        torch.testing.assert_close(compiled(*more), layer(*more))


@pytest.mark.usefixtures("compiler")
def test_a_compiled_layer_uses_the_cache_and_sees_changes(cache, monkeypatch):
    layer = experts("cached")
    states, index, weights = routing()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    built = []
    monkeypatch.setattr(
        "tnmoe.nn.compute.cache.build", lambda *args: built.append(args) or build(*args)
    )
    with torch.no_grad():
        first = compiled(states, index, weights)
        assert len(built) == 3
        torch.testing.assert_close(compiled(states, index, weights), first)
        assert len(built) == 3
        layer.up.center.mul_(2)
        changed = compiled(states, index, weights)
        assert len(built) == 4
        cache.clear()
        torch.testing.assert_close(changed, layer(states, index, weights))
    assert not torch.allclose(first, changed)


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert"])
def test_deterministic_mode_is_respected(route):
    states, index, weights = routing()
    layer = experts(route)
    torch.use_deterministic_algorithms(True)
    try:
        layer(states, index, weights).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cached_matrices_follow_every_change_of_a_core(cache):
    made = projection(dtype=torch.float32)
    made.route = "cached"
    rows, index = torch.randn(3, made.in_features), torch.tensor([0, 1, 2])
    changes = (
        lambda: made.center.mul_(2),
        lambda: made.aux[1].add_(1),
        lambda: setattr(made, "center", torch.nn.Parameter(made.center * 3)),
        lambda: made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}),
        lambda: made.double().float(),
    )
    with torch.no_grad():
        for change in changes:
            before = made(rows, grouped(index, 3))
            assert made(rows, grouped(index, 3)).equal(before)
            change()
            after = made(rows, grouped(index, 3))
            torch.testing.assert_close(after, one_by_one(made, rows, index))
    # An optimiser's step is such a change.
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made.route = "rebuilt"
    made(rows, grouped(index, 3)).sum().backward()
    optimizer.step()
    made.route = "cached"
    with torch.no_grad():
        torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


class WritesPastTorch(torch.optim.Optimizer):
    """As optimisers with kernels of their own do: torch's version counters see nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for core in group["params"]:
                core.detach().numpy().flat[1] += 1  # one number among many


@pytest.mark.parametrize("site", range(3))
def test_cached_matrices_follow_the_change_of_a_single_number(site, cache):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    rows, index = torch.randn(3, made.in_features), torch.tensor([0, 1, 2])
    with torch.no_grad():
        made(rows, grouped(index, 3))
        made.core_at(site).view(-1)[1] += 1  # not one of those that are looked at
        torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


@pytest.mark.parametrize("change", ["data", "numpy", "an optimiser", "before evaluation"])
def test_cached_matrices_follow_changes_that_torch_does_not_count(change, cache):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    rows, index = torch.randn(3, made.in_features), torch.tensor([0, 1, 2])
    optimizer = WritesPastTorch(made.parameters())
    with torch.no_grad():
        for core in made.parameters():
            made(rows, grouped(index, 3))
            version = core._version
            if change == "data":
                core.data.mul_(2)
            elif change == "numpy":
                core.numpy()[...] *= 2
            elif change == "an optimiser":
                optimizer.step()
            else:
                made.train()
                core.numpy().flat[1] += 1
                made.eval()
            assert core._version == version
            torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


def test_the_cache_keeps_to_its_limit_and_lets_go(cache):
    first, second = projection(dtype=torch.float32), projection("split", dtype=torch.float32)
    size = 4 * 3 * 12 * 12
    cache.limit = size
    with torch.no_grad():
        assert first.plan(100, training=False).seconds.keys() >= {"cached"}
        first.route = "cached"
        first(torch.randn(1, first.in_features), grouped(torch.tensor([0]), 3))
        assert cache.used == size
        assert "cached" not in second.plan(100, training=False).seconds
        assert "cached" not in first.plan(100, training=True).seconds
    copy.deepcopy(first)
    assert cache.used == size
    del first
    assert cache.used == 0
    cache.enabled = False
    assert "cached" not in second.plan(100, training=False).seconds


@pytest.mark.parametrize("change", ["in place", "another tensor", "another address"])
def test_kept_matrices_follow_changes_where_numbers_are_not_looked_at(change, cache, monkeypatch):
    """As on an accelerator, which would have to be waited for."""
    monkeypatch.setattr("tnmoe.nn.compute.cache._numbers_of", lambda cores: [])
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    rows, index = torch.randn(3, made.in_features), torch.tensor([0, 1, 2])
    with torch.no_grad():
        made(rows, grouped(index, 3))
        if change == "in place":
            made.aux[0].mul_(2)
        elif change == "another tensor":
            made.aux_0 = torch.nn.Parameter(made.aux[0] * 2)
        else:
            made.aux[0].data = made.aux[0].data * 2
        torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


@pytest.mark.parametrize("site", range(3))
def test_matrices_go_with_a_step_on_any_one_of_their_cores(site, cache):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    with torch.no_grad():
        made(torch.randn(1, made.in_features), grouped(torch.tensor([0]), 3))
    assert cache.used
    WritesPastTorch([made.core_at(site)]).step()
    assert cache.used == 0


def test_matrices_beyond_the_limit_are_built_and_not_kept_and_switching_off_lets_all_go(cache):
    first, second = projection(dtype=torch.float32), projection("split", dtype=torch.float32)
    cache.limit = 4 * 3 * 12 * 12
    with torch.no_grad():
        for each in (first, second):
            each.route = "cached"
            each(torch.randn(1, each.in_features), grouped(torch.tensor([0]), 3))
    assert cache.used == cache.limit
    cache.enabled = False
    assert cache.used == 0


def test_old_matrices_go_before_new_ones_are_built(cache, monkeypatch):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    used = []
    monkeypatch.setattr(
        "tnmoe.nn.compute.cache.build", lambda *args: used.append(cache.used) or build(*args)
    )
    with torch.no_grad():
        for _ in range(2):
            made(torch.randn(1, made.in_features), grouped(torch.tensor([0]), 3))
            made.center.mul_(2)
    assert used == [0, 0]


def test_modules_with_kept_matrices_can_swap_their_tensors(cache):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            for change in (
                lambda: made.to(torch.float64),
                lambda: made.load_state_dict(copy.deepcopy(made.state_dict())),
            ):
                rows = torch.randn(1, made.in_features, dtype=made.center.dtype)
                made(rows, grouped(torch.tensor([0]), 3))
                change()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_matrices_may_come_from_another_thread_while_some_are_forgotten(cache):
    made, other = projection(dtype=torch.float32), projection("split", dtype=torch.float32)

    def evaluate(each):
        each.route = "cached"
        with torch.no_grad():
            each(torch.randn(1, each.in_features), grouped(torch.tensor([0]), 3))

    class Interrupted(tuple):
        """A key that another thread comes in between to look at."""

        def __iter__(self):
            evaluate(other)
            return super().__iter__()

    evaluate(made)
    ((key, entry),) = cache._entries.items()
    cache._entries = {Interrupted(key): entry}
    cache.forget([made.center])
    assert cache.used == 4 * 3 * 12 * 8


@pytest.mark.parametrize("site", [0, 1])
def test_pruned_cores_are_found_at_their_sites(site):
    made = projection()
    prune.l1_unstructured(made, f"aux_{site}", amount=0.5)
    assert not made.aux[site].all()
    rows, index = torch.randn(3, made.in_features, dtype=torch.float64), torch.tensor([0, 1, 2])
    made.route = "rebuilt"
    torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


def test_a_step_of_an_optimiser_leaves_the_matrices_of_other_models_alone(cache):
    trained, other = projection(dtype=torch.float32), projection("split", dtype=torch.float32)
    optimizer = WritesPastTorch(trained.parameters())
    with torch.no_grad():
        for each in (trained, other):
            each.route = "cached"
            each(torch.randn(1, each.in_features), grouped(torch.tensor([0]), 3))
        both = cache.used
        optimizer.step()
        assert 0 < cache.used < both
        other.train(other.training)  # no change of mode
        assert 0 < cache.used < both


def test_cores_made_in_inference_mode_are_used_and_not_kept(cache):
    with torch.inference_mode():
        made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
        rows, index = torch.randn(3, made.in_features), torch.tensor([0, 1, 2])
        assert "cached" not in made.plan(3, training=False).seconds
        torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))
    assert cache.used == 0


def test_nothing_is_cached_while_gradients_are_asked_for(cache):
    layer = experts(None)
    states, index, weights = routing()
    layer(states, index, weights).sum().backward()
    assert cache.used == 0
    assert all(each.grad is not None for each in layer.parameters())


@pytest.mark.parametrize(
    ("states", "index", "weights", "message"),
    [
        ((3, 8), [[0], [5], [1]], (3, 1), r"experts from 0 to 3, or 4 for none, got 0 to 5"),
        ((3, 8), [[0], [-1], [1]], (3, 1), r"experts from 0 to 3, or 4 for none, got -1 to 1"),
        ((3, 7), [[0], [1], [1]], (3, 1), r"hidden_states \(3, 7\)"),
        ((3, 8), [[0], [1]], (2, 1), r"top_k_index \(2, 1\)"),
        ((3, 8), [[0], [1], [1]], (2, 1), r"top_k_weights \(2, 1\)"),
        ((3, 8), [0, 1, 1], (3, 1), r"top_k_index \(3,\)"),
    ],
)
def test_routing_that_does_not_fit_is_named_and_never_read_from_elsewhere(
    states, index, weights, message
):
    with pytest.raises(tn.InputError, match=message):
        experts(None)(torch.randn(states), torch.tensor(index), torch.ones(weights))


def test_kept_matrices_are_refused_where_gradients_are_wanted():
    layer = experts("cached")
    with pytest.raises(tn.InputError, match="route='cached' has no gradients"):
        layer(*routing())
    with torch.no_grad():
        layer(*routing())


def test_an_unknown_route_is_named():
    with pytest.raises(tn.InputError, match=r"route must be one of .*, got 'fast'"):
        experts("fast")(*routing())
