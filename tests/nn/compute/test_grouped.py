"""Products of grouped rows are those of a loop over experts, to any derivative."""

import pytest
import torch

from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer
from tnmoe.nn.compute.slots import Groups


def test_kernels_take_rows_of_whole_16_bytes_in_either_order(monkeypatch):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    fits = grouped_module._has_kernel
    rows = torch.zeros(3, 16, dtype=torch.bfloat16)
    weight = torch.zeros(2, 24, 16, dtype=torch.bfloat16)
    assert fits(rows, weight)
    assert fits(torch.zeros(3, 24, dtype=torch.bfloat16), weight.mT)
    assert not fits(rows.float(), weight.float())
    assert not fits(rows[:, :12], weight[..., :12])
    assert not fits(rows, weight[:, ::3])


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
    # The kernel treats narrow, wide and large matrices differently.
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
