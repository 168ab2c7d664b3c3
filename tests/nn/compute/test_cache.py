"""Kept matrices are those of the cores as they are now."""

import copy

import pytest
import torch

import tnmoe as tn
from tests.nn.compute.cases import (
    SHAPES_TO_CACHE,
    experts,
    grouped,
    one_by_one,
    projection,
    routing,
)
from tnmoe import nn
from tnmoe.nn.compute.matrices import build_matrices


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


@pytest.mark.usefixtures("compiler")
def test_a_compiled_layer_uses_the_cache_and_sees_changes(cache, monkeypatch):
    layer = experts("cached")
    states, index, weights = routing()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    built = []
    monkeypatch.setattr(
        "tnmoe.nn.compute.cache.build_matrices",
        lambda *args: built.append(args) or build_matrices(*args),
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
    # An optimiser's step is a change, too.
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made.route = "rebuilt"
    made(rows, grouped(index, 3)).sum().backward()
    optimizer.step()
    made.route = "cached"
    with torch.no_grad():
        torch.testing.assert_close(made(rows, grouped(index, 3)), one_by_one(made, rows, index))


class WritesPastTorch(torch.optim.Optimizer):
    """An optimiser with its own kernels: torch's version counters do not see its writes."""

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
        made.core_at(site).view(-1)[1] += 1  # not one of the samples
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


def test_the_cache_keeps_to_its_limit_and_drops_matrices_of_deleted_cores(cache):
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
def test_kept_matrices_follow_changes_where_no_numbers_are_sampled(change, cache, monkeypatch):
    """On an accelerator, samples would synchronise."""
    monkeypatch.setattr("tnmoe.nn.compute.cache._samples_of", lambda cores: [])
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
def test_a_step_on_any_core_drops_the_matrices(site, cache):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    with torch.no_grad():
        made(torch.randn(1, made.in_features), grouped(torch.tensor([0]), 3))
    assert cache.used
    WritesPastTorch([made.core_at(site)]).step()
    assert cache.used == 0


def test_matrices_beyond_the_limit_are_not_kept_and_switching_off_drops_all(cache):
    first, second = projection(dtype=torch.float32), projection("split", dtype=torch.float32)
    cache.limit = 4 * 3 * 12 * 12
    with torch.no_grad():
        for each in (first, second):
            each.route = "cached"
            each(torch.randn(1, each.in_features), grouped(torch.tensor([0]), 3))
    assert cache.used == cache.limit
    cache.enabled = False
    assert cache.used == 0


def test_old_matrices_are_dropped_before_new_ones_are_built(cache, monkeypatch):
    made = projection(SHAPES_TO_CACHE, dtype=torch.float32)
    made.route = "cached"
    used = []
    monkeypatch.setattr(
        "tnmoe.nn.compute.cache.build_matrices",
        lambda *args: used.append(cache.used) or build_matrices(*args),
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
        """A key; while it is read, another thread builds matrices."""

        def __iter__(self):
            evaluate(other)
            return super().__iter__()

    evaluate(made)
    ((key, entry),) = cache._entries.items()
    cache._entries = {Interrupted(key): entry}
    cache.forget([made.center])
    assert cache.used == 4 * 3 * 12 * 8


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


def test_nothing_is_cached_while_gradients_are_recorded(cache):
    layer = experts(None)
    states, index, weights = routing()
    layer(states, index, weights).sum().backward()
    assert cache.used == 0
    assert all(each.grad is not None for each in layer.parameters())


def test_kept_matrices_are_refused_where_gradients_are_needed():
    layer = experts("cached")
    with pytest.raises(tn.InputError, match="route='cached' has no gradients"):
        layer(*routing())
    with torch.no_grad():
        layer(*routing())
