"""Rounding of what forms store: to the nearest level, or such that outputs change least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from compression_calibration import Layer, damped
from compression_forms import (
    GROUP,
    Experts,
    Gauged,
    Leaf,
    Part,
    Product,
    Quantised,
    Together,
    Whole,
    replace_leaves,
)  # fmt: skip
from torch import Tensor, nn

# Scales that rounding tries, relative to those that reach the largest number of a group.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)

Method = Callable[[Sequence[Layer], float], list[Experts]]


def quantised(
    layers: Sequence[Layer], share: float, *, method: Method, bits: int, calibrated: bool = False
) -> list[Experts]:
    """Round what a method stores to 2^bits levels, with a scale in half precision per 64 numbers.

    With ``calibrated``, later columns of a matrix make up for the rounding of earlier ones (GPTQ,
    arXiv:2210.17323); otherwise every number goes to its nearest level.
    """
    results = method(layers, share)
    for layer, experts in zip(layers, results, strict=True):
        for module in list(experts.modules()):
            if isinstance(module, Product):
                turn_bond(module)
        if calibrated:
            round_experts(layer, experts, bits)
        round_form(experts, bits)
    return results


def round_form(form: nn.Module, bits: int) -> nn.Module:
    """Round all leaves of a form that are not rounded yet to the nearest levels, in place."""
    replace_leaves(form, partial(_nearest, bits=bits))
    return form


def _nearest(leaf: Whole, bits: int) -> Leaf:
    value = leaf.value.detach()
    if not value.numel():  # a factor of rank 0, or of full rank
        return leaf
    return Quantised(*round_nearest(value, bits), bits, leaf.free)


def round_experts(layer: Layer, experts: Experts, bits: int) -> None:
    """Round the leaves of simple forms by the moments that they meet, in place."""
    rounded: dict[nn.Module, nn.Module] = {}
    for name in ("up", "gate", "down"):
        form, moments = getattr(experts, name), damped(layer.moments(name))
        if not isinstance(form, Part):
            setattr(experts, name, round_for(form, moments, bits))
            continue
        if form.whole not in rounded:
            rounded[form.whole] = round_for(form.whole, moments, bits)
        form.whole = rounded[form.whole]


def round_for(form: nn.Module, moments: Tensor, bits: int) -> nn.Module:
    """Round a form whose inputs have these moments, (E, in, in), and return it.

    The second factor of a product is rounded first. The first one is then fitted anew, such that
    the product changes least, and rounded by the moments of its own inputs.
    """
    if isinstance(form, Whole) and form.value.numel():
        inputs = _common(moments, form)
        return Quantised(*round_calibrated(form.value.detach(), inputs, bits), bits, form.free)
    if isinstance(form, Together):
        for number, each in enumerate(form.forms):
            form.forms[number] = round_for(each, moments[number, None], bits)
    elif isinstance(form, Gauged):
        # The inputs of the columns that are not the identity's.
        places = form.places().argsort(1)[:, form().shape[1] :]
        rows = moments.gather(1, places[..., None].expand(-1, -1, moments.shape[2]))
        inner = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))
        form.rest = round_for(form.rest, inner, bits)
    elif isinstance(form, Product):
        _round_factors(form, moments, bits)
    return form


def _round_factors(form: Product, moments: Tensor, bits: int) -> None:
    before = form().detach().double()
    first, second = form.factors
    form.factors[1] = second = round_for(second, moments, bits)
    built = second().detach().double()
    inputs = built @ moments @ built.mT
    if isinstance(first, Whole) and first.value.numel():
        outputs = before @ moments @ built.mT
        inputs, outputs = _common(inputs, first), _common(outputs, first)
        first.value.data = torch.linalg.solve(inputs, outputs.mT).mT.float()
    form.factors[0] = round_for(first, inputs, bits)


def _common(moments: Tensor, factor: Whole) -> Tensor:
    """Return the mean of moments for a factor that experts share."""
    return moments.mean(0, keepdim=True) if len(factor.value) == 1 else moments


def turn_bond(product: Product) -> None:
    """Turn the bond of two factors at random, which gives its units equal scales."""
    first, second = product.factors[0], product.factors[-1]
    if len(product.factors) != 2 or not (isinstance(first, Whole) and isinstance(second, Whole)):
        return
    size = first.value.shape[-1]
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(size, size, generator=draw))[0]
    first.value.data, second.value.data = first.value @ turn, turn.mT @ second.value


def round_nearest(value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round every number to its nearest level; return codes and scales."""
    highest = 2 ** (bits - 1) - 1
    groups = nn.functional.pad(value, (0, -value.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scales = _scales(groups, highest)
    codes = _codes(groups, scales[..., None], highest)
    return codes.flatten(-2)[..., : value.shape[-1]].contiguous(), scales


def _scales(groups: Tensor, highest: int) -> Tensor:
    """Return scales in half precision, of a few those with the least squared errors.

    Levels lie symmetrically about 0. A smaller scale rounds most numbers better, and cuts the
    largest.
    """
    found = torch.stack([
        (share * groups.abs().amax(-1) / (highest + 0.5)).half().float().clamp_min(2**-24)
        for share in _SHARES
    ])  # fmt: skip
    errors = torch.stack([
        (_codes(groups, scales[..., None], highest) * scales[..., None] - groups).square().sum(-1)
        for scales in found
    ])  # fmt: skip
    return found.gather(0, errors.argmin(0, keepdim=True))[0]


def _codes(value: Tensor, scales: Tensor, highest: int) -> Tensor:
    return torch.round(value / scales).clamp(-highest - 1, highest)


def round_calibrated(value: Tensor, moments: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round column after column, and move each rounding error to the columns that follow.

    Columns of later groups get the errors of a whole group at once, in one product.

    Parameters
    ----------
    value : Tensor, shape (E, out, in)
    moments : Tensor, shape (E, in, in)
        Moments of the inputs, damped.
    bits : int

    Returns
    -------
    codes : Tensor, shape (E, out, in)
    scales : Tensor, shape (E, out, groups)
    """
    highest = 2 ** (bits - 1) - 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse).mT
    rest, codes, scales = value.double().clone(), [], []
    for start in range(0, value.shape[-1], GROUP):
        end = start + GROUP
        group, inner = rest[..., start:end].clone(), upper[:, None, start:end, start:end]
        scales.append(_scales(group.float(), highest))
        missed, scale = torch.zeros_like(group), scales[-1].double()
        for column in range(group.shape[-1]):
            code = _codes(group[..., column], scale, highest)
            missed[..., column] = (group[..., column] - code * scale) / inner[..., column, column]
            group[..., column:] -= missed[..., column, None] * inner[..., column, column:]
            codes.append(code.to(value.dtype))
        rest[..., end:] -= missed @ upper[:, start:end, end:]
    return torch.stack(codes, -1), torch.stack(scales, -1)
