"""Matrices that are built in blocks, used and dropped are the dense ones, and so are gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.nn.compute.cases import SHAPES, check_against_dense_matrices, grouped, projection
from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute import matrices as matrices_module
from tnmoe.nn.compute import rebuilt as rebuilt_module
from tnmoe.nn.compute.cores import Legs
from tnmoe.nn.mpo_projection import MPOProjection


@pytest.mark.parametrize("numbers", [1, 40, 10**9])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_of_any_size_make_the_same_matrices_and_gradients(name, numbers, monkeypatch):
    monkeypatch.setattr(matrices_module, "_BLOCK", numbers)
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
def test_blocks_cover_a_matrix_and_keep_to_the_limit_or_to_one_leg(out, in_, most):
    legs = Legs(out, in_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices_module, "_BLOCK", most)
        blocks = list(
            matrices_module.MatrixBuilder(torch.ones(2, out[1], in_[1], 2), legs).row_blocks()
        )
    assert [index for part, _ in blocks for index in range(out[0])[part]] == list(range(out[0]))
    features = range(legs.out_features)
    assert [row for _, rows in blocks for row in features[rows]] == list(features)
    one = out[1] * out[2] * legs.in_features
    # Blocks have about the same size, which may exceed the limit by one leg.
    assert all(len(range(out[0])[part]) * one < most + one for part, _ in blocks)


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_of_all_experts_at_once_do_as_well_as_one_after_the_other(name, monkeypatch):
    # As on an accelerator, where the code must not synchronise.
    monkeypatch.setattr(
        rebuilt_module, "_batches_of_experts", lambda offsets: [(slice(None), slice(None))]
    )
    made = projection(name)
    made.route = "rebuilt"
    rows = torch.randn(5, made.in_features, dtype=torch.float64)
    check_against_dense_matrices(made, rows, [0, 0, 0, 2, 2])


@pytest.mark.parametrize("route", ["rebuilt", "joint"])
@pytest.mark.parametrize(
    "shape", [tn.MPOShape((4, 4, 4), (4, 4, 4)), tn.MPOShape.split(32, 48, 4, 8)], ids=str
)
def test_grouped_kernels_do_as_well_as_loops(shape, route, monkeypatch):
    # The operators for CUDA; torch has them on a CPU, too.
    monkeypatch.setattr(
        rebuilt_module, "_batches_of_experts", lambda offsets: [(slice(None), slice(None))]
    )
    monkeypatch.setattr(grouped_module, "_has_kernel_for", lambda array: True)
    monkeypatch.setattr(grouped_module, "_is_aligned", lambda array: True)
    made = projection(shape, dtype=torch.float32)
    made.route = route
    rows = torch.randn(5, made.in_features)
    check_against_dense_matrices(made, rows, [0, 0, 0, 2, 2])


def test_only_cores_are_kept_for_the_backward_and_only_experts_with_rows_are_built(monkeypatch):
    torch.manual_seed(0)
    made = MPOProjection(6, tn.MPOShape((4, 8, 4), (4, 8, 4)), max_bond=8)
    made.route = "rebuilt"
    kept, built = [], []
    left_products = matrices_module.MatrixBuilder.left_products
    monkeypatch.setattr(
        matrices_module.MatrixBuilder,
        "left_products",
        lambda self, left: built.append(left) or left_products(self, left),
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
