"""SmolLM2-135M as a mixture: its networks become experts, and training on domains parts them.

Experts and routers alone train. They are what the benchmark compresses, and everything else is
pretrained already: attention and embeddings in training would take time and memory, and would
adapt to the domains in the experts' place.

Copies part slowly. Drop-Upcycling (arXiv:2502.19261) draws a share of every expert's hidden units
anew, so that experts differ from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from compression_models import Budget, Size
from transformers import LlamaForCausalLM, MixtralForCausalLM

from experiments.weights import smollm2, smollm2_tokenizer
from tnmoe import hf


@dataclass(frozen=True)
class Upcycled(Size):
    """Sizes of SmolLM2-135M as a mixture, and of its training.

    Attributes
    ----------
    noise : float
        Noise on every expert at the start, relative to its matrix, so that experts part even if
        they meet the same tokens.
    redrawn : float
        Share of the hidden units of every expert that are drawn anew.
    mixed : int
        Last layers that become mixtures; the other ones keep their networks.
    """

    budget: ClassVar[Budget] = Budget(
        calibration=8, held_out=8, batch=4, probe_every=4, removed=8, healing=20, rates=(2e-4,)
    )
    noise: float = 0.002
    redrawn: float = 0.0
    mixed: int = 30

    def model(self, seed: int) -> MixtralForCausalLM:
        """Load the dense model, and upcycle it."""
        torch.manual_seed(seed)
        return upcycled(smollm2(), self)

    def encoder(self, texts: Sequence[str]) -> Callable[[str], np.ndarray]:
        """Return a function that encodes texts by the model's own vocabulary.

        It does not split texts into lines: some of its tokens go on after a line break.
        """
        tokenizer = smollm2_tokenizer().backend_tokenizer
        return lambda text: np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)


# An expert sees 256 tokens of a batch. In 14 steps of 256 tokens, the loss of the dense model rose
# by 0.8 nats at a rate of 2e-3, and fell by 0.1 at this one.
SMOLLM2 = Upcycled(
    hidden=576, intermediate=1536, layers=30, heads=9, steps=150, windows=4, window=256, rate=4e-4,
    vocabulary=49152,
)  # fmt: skip

# Only the last layers are mixtures, so that training passes backwards through these alone.
REDRAWN = replace(SMOLLM2, steps=300, rate=1e-3, redrawn=0.5, mixed=6)


def upcycled(dense: LlamaForCausalLM, size: Upcycled) -> MixtralForCausalLM:
    """Turn a dense model into a mixture of copies; only experts and routers train.

    Noise and routers come from torch's global generator.
    """
    config = hf.MPOEConfig(
        num_experts=size.experts, num_experts_per_tok=size.top_k, layout="dense",
        expert_noise=size.noise, balance_weight=0.0,
    )  # fmt: skip
    networks = [layer.mlp for layer in dense.model.layers]
    model = hf.to_moe(hf.upcycle(dense, config))
    assert isinstance(model, MixtralForCausalLM)
    # The fastest one in training.
    model.set_experts_implementation("grouped_mm")
    layers: list[Any] = list(model.model.layers)
    first = len(layers) - min(size.mixed, len(layers))
    for layer, network in zip(layers[:first], networks, strict=False):
        layer.mlp = network
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers[first:]:
        redraw(layer.mlp.experts, size.redrawn)
        for parameter in layer.mlp.parameters():
            parameter.requires_grad_(True)
    return model


def redraw(experts: Any, share: float) -> None:
    """Draw a share of every expert's hidden units anew, with the mean and deviation of the old."""
    for gate_up, down in zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True):
        units = torch.randperm(down.shape[1])[: round(share * down.shape[1])]
        for matrix in (*gate_up.chunk(2), down.mT):
            if len(units):
                old = matrix[units]
                matrix[units] = old.mean() + old.std() * torch.randn_like(old)
