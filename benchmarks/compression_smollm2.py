"""SmolLM2-135M as a mixture: its networks become experts, and training on domains parts them.

Experts and routers alone train. They are what the benchmark compresses, and everything else is
pretrained already: attention and embeddings in training would take time and memory, and would
adapt to the domains in the experts' place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    """

    budget: ClassVar[Budget] = Budget(
        calibration=8, held_out=8, batch=4, probe_every=4, removed=8, healing=20, rates=(2e-4,)
    )
    noise: float = 0.002

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


def upcycled(dense: LlamaForCausalLM, size: Upcycled) -> MixtralForCausalLM:
    """Turn a dense model into a mixture of copies; only experts and routers train.

    Noise and routers come from torch's global generator.
    """
    config = hf.MPOEConfig(
        num_experts=size.experts, num_experts_per_tok=size.top_k, layout="dense",
        expert_noise=size.noise, balance_weight=0.0,
    )  # fmt: skip
    model = hf.to_moe(hf.upcycle(dense, config))
    assert isinstance(model, MixtralForCausalLM)
    # The fastest one in training.
    model.set_experts_implementation("grouped_mm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model
