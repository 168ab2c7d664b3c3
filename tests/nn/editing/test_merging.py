"""Merged experts, against means of dense matrices."""

import pytest
import torch

import tnmoe as tn
from tests.nn.editing.layers import KINDS, DenseLayer, make, tokens
from tests.nn.layouts import E
from tnmoe import nn

# Experts own one core of every chain, or whole matrices.
EXACT = ["hidden", "stacked; gated, biases", "only up", "hidden, bonds of two"]


def weighted_mean(tensors, shares):
    return sum(share * each for share, each in zip(shares, tensors, strict=True))


def norm(tensor):
    return float(torch.linalg.vector_norm(tensor.detach()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_errors_are_those_of_the_dense_matrices_and_no_other_expert_changes(kind):
    layer = make(kind)
    projections = layer.experts.projections()
    before = DenseLayer.of(layer)
    matrices = {name: each.weight().detach().clone() for name, each in projections.items()}
    merged = nn.merge_experts(layer, [3, 1], [1, 3])
    assert merged.expert == 2
    assert layer.experts.num_experts == layer.router.num_experts == 3
    for name, projection in projections.items():
        mean = weighted_mean(matrices[name][[3, 1]], [0.25, 0.75])
        base = projection.base.weight if isinstance(projection, nn.ResidualProjection) else 0
        if hasattr(base, "T") and base.shape != mean.shape:
            base = base.T
        after = projection.weight().detach()
        error = norm(after[2] - mean) / norm(mean - base)
        padding = 0.5 if "padded" in kind else 1e-6  # its entries count in no matrix
        assert error == pytest.approx(merged.errors[name], abs=padding)
        torch.testing.assert_close(after[:2], matrices[name][[0, 2]])
    after = DenseLayer.of(layer)
    for name, bias in before.biases.items():
        if not kind.endswith("linear"):
            mean = weighted_mean(bias[[3, 1]], [0.25, 0.75])
            torch.testing.assert_close(after.biases[name][2], mean)
    for name in ("router", "router_bias"):
        old, new = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(new[2], weighted_mean(old[[3, 1]], [0.25, 0.75]))
        assert torch.equal(new[:2], old[[0, 2]])


@pytest.mark.parametrize("kind", EXACT)
def test_means_are_exact_where_experts_own_one_core(kind):
    errors = nn.merge_experts(make(kind), [0, 2, 3]).errors
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_merge_into_themselves(kind):
    layer, x = make(kind), tokens()
    nn.remove_experts(layer, [2, 3])
    expected = layer(x)
    nn.add_experts(layer, 2, like=[1, 1])
    merged = nn.merge_experts(layer, [1, 3, 2])
    assert merged.expert == 1
    assert layer.router.open_experts is None
    assert max(merged.errors.values()) < 1e-7
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_residual_matrices_of_two_sites_get_the_best_mean_of_their_rank():
    layer = make("residual")
    deltas = layer.experts.up.delta.weight().detach()
    mean = deltas[[0, 1]].mean(0)
    rank = layer.experts.up.delta.bond_dims[0]
    best = norm(torch.linalg.svdvals(mean)[rank:]) / norm(mean)
    assert nn.merge_experts(layer, [0, 1]).errors["up"] == pytest.approx(best, rel=1e-9)
    found = norm(layer.experts.up.delta.weight()[0] - mean) / norm(mean)
    assert found == pytest.approx(best, rel=1e-9)


def test_matrices_of_low_rank_get_the_best_mean_of_the_first_rank():
    layer = make("low rank")
    up = layer.experts.up
    matrices, ranks = up.weight().detach(), up.ranks
    mean = matrices[[2, 1, 3]].mean(0)
    best = norm(torch.linalg.svdvals(mean)[ranks[2] :]) / norm(mean)
    merged = nn.merge_experts(layer, [2, 1, 3])
    assert up.ranks == (ranks[0], ranks[2])
    assert merged.errors["up"] == pytest.approx(best, rel=1e-9)


def test_chains_around_a_shared_core_come_nearer_than_means_of_their_cores():
    layer = make("interleaved")
    up = layer.experts.up
    mean = up.weight().detach()[[0, 1]].mean(0)
    cores = [core if core.ndim == 4 else core[[0, 1]].mean(0) for core in up.cores.sites()]
    naive = norm(tn.MPO(cores, up.shape).to_matrix() - mean) / norm(mean)
    merged = nn.merge_experts(layer, [0, 1])
    assert merged.errors["up"] < 0.9 * naive
    # No change of one core alone brings the matrix nearer to the mean.
    error = (up.weight()[merged.expert] - mean).square().sum() / norm(mean) ** 2
    for gradient in torch.autograd.grad(error, up.owned_parameters):
        assert norm(gradient) < 5e-3


def test_experts_that_are_the_base_merge_into_one_that_still_trains():
    layer = make("residual", top_k=1)
    new = nn.add_experts(layer, 2)
    merged = nn.merge_experts(layer, new)
    assert merged.errors == {"up": 0.0, "down": 0.0}
    assert not layer.experts.up.delta.weight()[merged.expert].any()
    nn.open_experts(layer)
    nn.close_experts(layer, range(E))
    layer(tokens()).square().sum().backward()
    gradients = [core.grad[merged.expert] for core in layer.experts.down.delta.owned_parameters]
    assert any(each.any() for each in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["interleaved; biases", "residual", "low rank", "hidden"])
def test_merged_experts_have_the_dtype_of_the_layer(kind, dtype):
    layer = make(kind, dtype=dtype)
    nn.merge_experts(layer, [0, 2])
    assert {each.dtype for each in layer.parameters()} == {dtype}
    assert layer(tokens(dtype)).isfinite().all()


def test_a_merged_expert_is_open_if_one_of_its_parts_was():
    layer = make("stacked")
    nn.close_experts(layer, [1, 2])
    assert nn.merge_experts(layer, [1, 0]).expert == 0
    assert layer.router.open_experts.tolist() == [0, 2]
    nn.add_experts(layer, 1)
    nn.merge_experts(layer, [1, 3])
    assert layer.router.open_experts.tolist() == [0, 2]


def test_projections_with_common_cores_are_refused():
    layer = make("gate and up share ends; gated")
    layer.experts.gate.set_core(0, layer.experts.up.core_at(0))
    before = layer.experts.up.weight()
    with pytest.raises(tn.errors.InputError, match=r"cores in common .* use remove_experts"):
        nn.merge_experts(layer, [0, 1])
    assert torch.equal(layer.experts.up.weight(), before)
