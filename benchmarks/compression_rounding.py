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
        round_form(experts, bits, _moments(layer, experts) if calibrated else {})
    return results


def round_form(form: nn.Module, bits: int, moments: dict[nn.Module, Tensor]) -> nn.Module:
    """Round all leaves of a form, in place; calibrated are those with moments."""
    replace_leaves(form, partial(_rounded, bits=bits, moments=moments))
    return form


def turn_bond(product: Product) -> None:
    """Turn the bond of two factors at random, which gives its units equal scales."""
    first, second = product.factors[0], product.factors[-1]
    if len(product.factors) != 2 or not (isinstance(first, Whole) and isinstance(second, Whole)):
        return
    size = first.value.shape[-1]
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(size, size, generator=draw))[0]
    first.value.data, second.value.data = first.value @ turn, turn.mT @ second.value


def _rounded(leaf: Whole, bits: int, moments: dict[nn.Module, Tensor]) -> Leaf:
    value = leaf.value.detach()
    if not value.numel():  # a factor of rank 0, or of full rank
        return leaf
    if leaf in moments:
        return Quantised(*round_calibrated(value, moments[leaf], bits), bits, leaf.free)
    return Quantised(*round_nearest(value, bits), bits, leaf.free)


def round_nearest(value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round every number to its nearest level; return codes and scales."""
    highest = 2 ** (bits - 1) - 1
    groups = nn.functional.pad(value, (0, -value.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scales = _scales(groups, highest)
    codes = torch.round(groups / scales[..., None]).clamp(-highest - 1, highest)
    return codes.flatten(-2)[..., : value.shape[-1]].contiguous(), scales


def _scales(groups: Tensor, highest: int) -> Tensor:
    """Return scales in half precision; levels lie symmetrically about 0."""
    scales = groups.abs().amax(-1) / (highest + 0.5)
    return scales.half().float().clamp_min(2**-24)


def round_calibrated(value: Tensor, moments: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round column after column, and move each rounding error to the columns that follow.

    Columns of later groups get the errors of a whole group at once, in one product.

    Parameters
    ----------
    value : Tensor, shape (E, out, in)
    moments : Tensor, shape (E, in, in)
        Moments of the inputs.
    bits : int

    Returns
    -------
    codes : Tensor, shape (E, out, in)
    scales : Tensor, shape (E, out, groups)
    """
    highest = 2 ** (bits - 1) - 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments)))
    upper = torch.linalg.cholesky(inverse).mT
    rest, codes, scales = value.double().clone(), [], []
    for start in range(0, value.shape[-1], GROUP):
        end = start + GROUP
        group, inner = rest[..., start:end].clone(), upper[:, None, start:end, start:end]
        scales.append(_scales(group.float(), highest))
        missed, scale = torch.zeros_like(group), scales[-1].double()
        for column in range(group.shape[-1]):
            code = torch.round(group[..., column] / scale).clamp(-highest - 1, highest)
            missed[..., column] = (group[..., column] - code * scale) / inner[..., column, column]
            group[..., column:] -= missed[..., column, None] * inner[..., column, column:]
            codes.append(code.to(value.dtype))
        rest[..., end:] -= missed @ upper[:, start:end, end:]
    return torch.stack(codes, -1), torch.stack(scales, -1)


def _moments(layer: Layer, experts: Experts) -> dict[nn.Module, Tensor]:
    """Return the moments that the leaves of simple forms meet."""
    found: dict[nn.Module, Tensor] = {}
    for name, form in (("up", experts.up), ("gate", experts.gate), ("down", experts.down)):
        inputs = layer.moments(name).double()
        if isinstance(form, Part):
            # Parts of one stack meet the same inputs.
            inputs = inputs if form.axis else torch.cat([inputs, inputs])
            form = form.whole
        found |= form_moments(form, inputs)
    return found


def form_moments(form: nn.Module, inputs: Tensor) -> dict[nn.Module, Tensor]:
    """Return the moments of the leaves of a form whose inputs have these moments."""
    if isinstance(form, Whole):
        return {form: inputs}
    if isinstance(form, Together):
        pairs = zip(form.forms, inputs[:, None], strict=True)
        return {
            key: each for one, moments in pairs for key, each in form_moments(one, moments).items()
        }
    if not isinstance(form, Product):
        return {}
    first, second = form.factors
    other = second().detach().double()
    found = {first: _common(other @ inputs @ other.mT, first)}
    if isinstance(second, Gauged):
        # The inputs of the columns that are not the identity's.
        places = second.places().argsort(1)[:, other.shape[1] :]
        rows = inputs.gather(1, places[..., None].expand(-1, -1, inputs.shape[2]))
        found[second.rest] = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))
        return found
    return found | {second: _common(inputs, second)}


def _common(moments: Tensor, factor: nn.Module) -> Tensor:
    """Return the mean of moments for a factor that experts share."""
    assert isinstance(factor, Whole)
    return moments.mean(0, keepdim=True) if len(factor.value) == 1 else moments
