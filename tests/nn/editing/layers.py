"""Layers of every kind, and the dense networks that they must agree with after every change."""

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu

from tests.nn import layouts
from tests.nn.layouts import E, F, H
from tnmoe import nn

TOKENS = 40


def _experts(name, dtype):
    kind, _, variant = name.partition("; ")
    gated = "gated" in variant
    bias = {"biases": True, "common bias": "common"}.get(variant.removeprefix("gated, "), False)
    if kind == "low rank":
        return layouts.vary(layouts.low_rank_experts(gated=gated, bias=bias, dtype=dtype))
    if kind == "stacked":
        made = nn.DenseExperts(E, H, F, "gelu", gated=gated, bias=bias, dtype=dtype)
        return layouts.vary(made)
    if "gate_up" in variant:
        return layouts.make_fused(kind, bias=True, dtype=dtype)
    if "linear" in variant:
        return layouts.from_linear(kind, dtype=dtype)
    return layouts.make(kind, gated=gated, bias=bias, dtype=dtype)


KINDS = [
    *layouts.LAYOUTS,
    "stacked",
    "low rank",
    *(
        f"{kind}; {variant}"
        for kind in ("interleaved", "hidden", "residual", "stacked", "low rank")
        for variant in ("biases", "common bias", "gated", "gated, biases")
    ),
    "gate and up share ends; gated",
    "interleaved; gate_up",
    "residual; gate_up",
    "hidden; linear",
    "residual; linear",
]


def make(name, top_k=2, dtype=torch.float64, **router):
    """Make a layer of a kind of experts, all of whose numbers are random."""
    torch.manual_seed(0)
    made = nn.TopKRouter(H, E, top_k, **{"bias": True, "dtype": dtype} | router)
    return nn.MPOMoE(layouts.vary(made, 1.0), _experts(name, dtype))


def tokens(dtype=torch.float64, count=TOKENS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class DenseLayer:
    """The matrices, biases and router of a layer as it was, one expert after the other."""

    matrices: dict
    biases: dict
    router: torch.Tensor
    router_bias: torch.Tensor

    @classmethod
    def of(cls, layer):
        def copied(found):
            return {name: each.detach().clone() for name, each in found.items()}

        return cls(
            copied(layer.experts.matrices()),
            copied(layer.experts.biases()),
            layer.router.weight.detach().clone(),
            layer.router.bias.detach().clone(),
        )

    def select(self, experts):
        def chosen(found):
            return {name: each[experts] for name, each in found.items()}

        return DenseLayer(
            chosen(self.matrices),
            chosen(self.biases),
            self.router[experts],
            self.router_bias[experts],
        )

    def __call__(self, x, top_k=2):
        values, index = (x @ self.router.T + self.router_bias).topk(top_k)
        return sum(
            weight[:, None]
            * torch.stack([self._expert(int(e), row) for e, row in zip(one, x, strict=True)])
            for weight, one in zip(values.softmax(-1).T, index.T, strict=True)
        )

    def _expert(self, expert, row):
        def product(name, row):
            return self.matrices[name][expert] @ row + (
                self.biases[name][expert] if name in self.biases else 0
            )

        up = product("up", row)
        inner = gelu(product("gate", row)) * up if "gate" in self.matrices else gelu(up)
        return product("down", inner)
