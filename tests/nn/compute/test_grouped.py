"""Products of grouped rows are those of a loop over experts, to any derivative."""

import pytest
import torch

from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute.grouped import grouped_linear, grouped_outer, shared_linear
from tnmoe.nn.compute.slots import Groups


def test_kernels_take_rows_of_whole_16_bytes_in_either_order(monkeypatch):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    fits = grouped_module._has_kernel
    rows = torch.zeros(3, 16, dtype=torch.bfloat16)
    weight = torch.zeros(2, 24, 16, dtype=torch.bfloat16)
    assert fits(rows, weight)
    assert fits(torch.zeros(3, 24, dtype=torch.bfloat16), weight.mT)
    assert not fits(rows.float(), weight.float())
    assert not fits(rows.half(), weight.half())
    assert not fits(rows[:, :12], weight[..., :12])
    assert not fits(rows, weight[:, ::3])
    # A single row counts as contiguous, but its stride is that of the longer ones.
    assert not fits(torch.zeros(1, 20, dtype=torch.bfloat16)[:, :16], weight)
    assert not fits(at_odd_address(rows), weight)


def at_odd_address(array):
    """A copy of an array that does not begin at a multiple of 16 bytes."""
    return array.new_empty(array.numel() + 1)[1:].view(array.shape).copy_(array)


def as_slice(array):
    """A copy of an array in longer rows."""
    wider = array.new_empty(*array.shape[:-1], array.shape[-1] + 3)
    return wider[..., : array.shape[-1]].copy_(array)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("change", [lambda array: array, at_odd_address, as_slice])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("columns", [None, 8])
def test_a_gpu_multiplies_rows_that_lie_in_memory_in_any_way(
    dtype, change, rows, columns, monkeypatch
):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return change(torch.randn(size, generator=generator).to(dtype))

    # Torch's kernel returns longer rows where 12 numbers are not a multiple of 16 bytes.
    more = () if columns is None else (columns,)
    tokens, weight, slopes = draw(rows, 16, *more), draw(3, 12, 16), draw(rows, 12, *more)
    index = torch.tensor([0, 0, 2, 2, 2])[:rows]
    offsets = Groups.of(index, 3).offsets
    for grad in (torch.enable_grad(), torch.no_grad()):
        with grad:
            product = grouped_linear(tokens, weight, offsets)
        assert product.is_contiguous()
        expected = torch.einsum("toi,ti...->to...", weight[index].float(), tokens.float())
        torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=2e-2)
    outer = grouped_outer(slopes, tokens, offsets)
    assert outer.is_contiguous()
    chosen = torch.nn.functional.one_hot(index, 3).float()
    sums = "te,to,ti->eoi" if columns is None else "te,ton,tin->eoi"
    expected = torch.einsum(sums, chosen, slopes.float(), tokens.float())
    torch.testing.assert_close(outer.float(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out", [12, 16])
@pytest.mark.parametrize("depth", [12, 16])
@pytest.mark.parametrize("columns", [None, 3, 40])
@pytest.mark.parametrize("limit", [grouped_module._GATHERED, 0])
def test_few_rows_and_one_expert_never_make_the_cpu_wait_for_a_gpu(
    dtype, out, depth, columns, limit, monkeypatch
):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    monkeypatch.setattr(grouped_module, "_GATHERED", limit)
    monkeypatch.setattr(grouped_module, "blocks_of", None)  # it reads the offsets
    index, experts = (torch.tensor([0, 0, 2, 3]), 5) if limit else (torch.zeros(4).long(), 1)
    more = () if columns is None else (columns,)
    rows, weight = torch.randn(4, depth, *more).to(dtype), torch.randn(experts, out, depth)
    with torch.no_grad():
        product = grouped_linear(rows, weight.to(dtype), Groups.of(index, experts).offsets)
    expected = torch.einsum("toi,ti...->to...", weight.to(dtype)[index].float(), rows.float())
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=2e-2)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("depth", "columns"), [(3, 2), (5, 20), (400, 17)])
def test_one_matrix_multiplies_the_columns_of_all_rows(depth, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, matrix, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((6, depth, columns), (depth + 1, depth), (6, depth + 1, columns))
    )
    given = rows.requires_grad_(), matrix.requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in given]
    product, expected = shared_linear(*given), exact[1] @ exact[0]
    expected.backward(grad.double())
    product.backward(grad)
    rounding = 8 * torch.finfo(dtype).eps
    gradients = [(a.grad, b.grad) for a, b in zip(given, exact, strict=True)]
    for found, true in ((product, expected), *gradients):
        assert found.dtype == dtype
        assert (found - true).norm() <= rounding * true.norm()


def test_products_with_one_matrix_have_derivatives_of_every_order():
    rows = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shared_linear, (rows, matrix))
    assert torch.autograd.gradgradcheck(shared_linear, (rows, matrix))
    expected = torch.func.grad(lambda *x: (x[1] @ x[0]).sin().sum(), argnums=(0, 1))(rows, matrix)
    found = torch.func.grad(lambda *x: shared_linear(*x).sin().sum(), argnums=(0, 1))(rows, matrix)
    torch.testing.assert_close(found, expected)
    tangents = torch.randn_like(rows), torch.randn_like(matrix)
    _, found = torch.func.jvp(shared_linear, (rows, matrix), tangents)
    torch.testing.assert_close(found, matrix @ tangents[0] + tangents[1] @ rows)


def test_one_matrix_of_no_rows_has_no_product_and_no_gradient():
    rows, matrix = torch.zeros(0, 3, 2), torch.randn(5, 3, requires_grad=True)
    product = shared_linear(rows, matrix)
    product.sum().backward()
    assert product.shape == (0, 5, 2)
    assert (matrix.grad == 0).all()
