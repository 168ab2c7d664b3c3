"""What ``tnmoe.hf.compress`` makes of a mixture, as forms that other steps can round and count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compression_calibration import Layer
from compression_forms import (
    Experts,
    Gauged,
    Part,
    Product,
    Sum,
    Together,
    Whole,
    balanced,
    experts_of,
)  # fmt: skip
from torch import Tensor, nn

from tnmoe import SharedMPO
from tnmoe.hf import CompressionConfig
from tnmoe.hf.compression_plan import choose, form_of, options_of, written_matrices
from tnmoe.hf.compression_weights import LayerWeights
from tnmoe.joint.low_rank import LowRankFactors
from tnmoe.options import CompressedLayout


def product(
    layers: Sequence[Layer],
    share: float,
    *,
    layout: CompressedLayout = "auto",
    gauge: bool = True,
) -> list[Experts]:
    """Compress all layers by the plan of the library, within a share of their numbers.

    Without the gauge, factors of low rank have no columns of the identity, which suits rounding.
    An expert whose factors would hold as many numbers as its matrix then keeps the matrix. The
    result may exceed the share.
    """
    config = CompressionConfig(keep=share, layout=layout)
    weights = [LayerWeights(layer.seen, config.damping) for layer in layers]
    stacks = [_stacks(layer) for layer in layers]
    options = [
        options_of(matrices, str(number), name, config.layouts, own)
        for number, (own, parts) in enumerate(zip(weights, stacks, strict=True))
        for name, matrices in parts.items()
    ]
    # Where a base alone exceeds the share, it stays alone.
    least = sum(min(each.params) for each in options)
    budget = max(least, int(share * sum(each.full for each in options)))
    choices = iter(choose(options, config, budget))
    results = []
    for own, parts in zip(weights, stacks, strict=True):
        forms = {}
        for name, matrices in parts.items():
            choice = next(choices)
            if choice.layout is None or choice.bond is None:
                forms[name] = Whole(matrices)
            else:
                form = form_of(matrices, name, choice.layout, own)
                written = written_matrices(form, matrices, choice.bond)
                forms[name] = as_form(written)
                if not gauge:
                    forms[name] = _without_gauge(forms[name], matrices)
        results.append(_experts_of(forms))
    return results


def _stacks(layer: Layer) -> dict[Any, Tensor]:
    return {"gate_up": torch.cat([layer.gate, layer.up], dim=1), "down": layer.down}


def _experts_of(forms: dict[Any, nn.Module]) -> Experts:
    both, down = forms["gate_up"], forms["down"]
    with torch.no_grad():
        units = both().shape[1] // 2
    gate, up = (Part(both, start, units) for start in (0, units))
    return experts_of({"gate": gate, "up": up, "down": down})


def as_form(written: SharedMPO | list[LowRankFactors]) -> nn.Module:
    """Return matrices as a form that stores the same numbers."""
    if isinstance(written, SharedMPO):
        cores = [core if core.ndim == 5 else core[None] for core in written.cores]
        chain = Product(Whole(cores[0][:, 0, :, 0, :]), Whole(cores[1][:, :, 0, :, 0]))
        if written.base is None:
            return chain
        return Sum(Whole(written.base.cores[0][0, :, :, 0][None]), chain)
    return Together([_form_of_factors(each) for each in written])


def _form_of_factors(factors: LowRankFactors) -> nn.Module:
    # Where every input comes from in [1 T]. A file needs an index per input for it.
    order = factors.columns.argsort()[None]
    return Product(Whole(factors.outer[None]), Gauged(Whole(factors.inner[None]), order))


def _without_gauge(form: nn.Module, matrices: Tensor) -> nn.Module:
    if not isinstance(form, Together):
        return form
    pairs = zip(form.forms, matrices[:, None], strict=True)
    return Together([_plain_factors(each, matrix) for each, matrix in pairs])


def _plain_factors(form: nn.Module, matrix: Tensor) -> nn.Module:
    assert isinstance(form, Product)
    outer, inner = (factor().detach().double() for factor in form.factors)
    if outer.numel() + inner.numel() >= matrix.numel():
        return Whole(matrix)
    return Product(*map(Whole, balanced(outer, inner)))
