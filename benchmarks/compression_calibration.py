"""What calibration tokens show of the experts of a mixture: moments, loads, outputs, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM

# Share of the mean eigenvalue that moments gain, as in tnmoe.decompose_shared.
_DAMPING = 0.01


@dataclass
class Layer:
    """The experts of a layer, and what calibration tokens did there. Sums run over slots.

    Attributes
    ----------
    up, gate : Tensor, shape (E, F, H)
    down : Tensor, shape (E, H, F)
    router : Tensor, shape (E, H)
    inputs : Tensor, shape (E, H, H)
        Σ x xᵀ of the inputs of every expert.
    hidden : Tensor, shape (E, F, F)
        Σ h hᵀ of the inputs of ``down``.
    slots : Tensor, shape (E,)
    activation : Tensor, shape (E,)
        Σ p·‖y‖ of the outputs y with their weights p.
    mean_outputs : Tensor, shape (E, H)
        Mean output of every expert over all tokens, whether they visit it or not.
    gradients : dict of str to Tensor
        Σ g gᵀ of the loss's derivatives by the outputs of ``up``, ``gate``, (E, F, F), and
        ``down``, (E, H, H).
    fisher : dict of str to Tensor
        Squared derivatives by the matrices, summed over batches.
    """

    up: Tensor
    gate: Tensor
    down: Tensor
    router: Tensor
    inputs: Tensor
    hidden: Tensor
    slots: Tensor
    activation: Tensor
    mean_outputs: Tensor
    gradients: dict[str, Tensor]
    fisher: dict[str, Tensor]

    @property
    def numbers(self) -> int:
        """Numbers of all matrices."""
        return self.up.numel() + self.gate.numel() + self.down.numel()

    def moments(self, name: str) -> Tensor:
        """Return the moments of the inputs of a matrix."""
        return self.hidden if name == "down" else self.inputs


class _Observed(nn.Module):
    """The experts of a layer, which note what they see."""

    def __init__(self, experts: Any, router: Tensor) -> None:
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        weights = {"up": up, "gate": gate, "down": experts.down_proj.detach()}
        self.weights = {name: each.clone().requires_grad_() for name, each in weights.items()}
        count, size, width = up.shape
        zeros = torch.zeros
        self.layer = Layer(
            **{name: each.detach().clone() for name, each in self.weights.items()},
            router=router.detach().clone(),
            inputs=zeros(count, width, width), hidden=zeros(count, size, size),
            slots=zeros(count), activation=zeros(count), mean_outputs=zeros(count, width),
            gradients={
                "up": zeros(count, size, size), "gate": zeros(count, size, size),
                "down": zeros(count, width, width),
            },
            fisher={name: torch.zeros_like(each) for name, each in self.weights.items()},
        )  # fmt: skip
        self.tokens = 0

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as ``MixtralExperts``, and note moments."""
        result = torch.zeros_like(states)
        layer = self.layer
        for expert in range(len(layer.up)):
            token, place = torch.where(index == expert)
            inputs, share = states[token], weights[token, place, None]
            gate = inputs @ self.weights["gate"][expert].mT
            up = inputs @ self.weights["up"][expert].mT
            hidden = nn.functional.silu(gate) * up
            outputs = hidden @ self.weights["down"][expert].mT
            for name, tensor in (("gate", gate), ("up", up), ("down", outputs)):
                tensor.register_hook(self._adder(layer.gradients[name], expert))
            with torch.no_grad():
                layer.inputs[expert] += inputs.mT @ inputs
                layer.hidden[expert] += hidden.mT @ hidden
                layer.slots[expert] += len(token)
                layer.activation[expert] += (share * outputs).norm(dim=1).sum()
                layer.mean_outputs[expert] += self._outputs(expert, states).sum(0)
            result = result.index_add(0, token, outputs * share)
        self.tokens += len(states)
        return result

    def _outputs(self, expert: int, states: Tensor) -> Tensor:
        gate, up = (states @ self.weights[name][expert].mT for name in ("gate", "up"))
        return (nn.functional.silu(gate) * up) @ self.weights["down"][expert].mT

    @staticmethod
    def _adder(total: Tensor, expert: int):  # type: ignore[no-untyped-def]
        def add(gradient: Tensor) -> None:
            total[expert] += gradient.mT @ gradient

        return add

    def end_batch(self) -> None:
        """Move the derivatives by the matrices into the Fisher information."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.layer.fisher[name] += weight.grad**2
                weight.grad = None


def calibrate(model: MixtralForCausalLM, windows: Tensor, batch: int = 8) -> list[Layer]:
    """Send windows through a model, and return what its experts saw. The model stays as it is."""
    blocks = [layer.mlp for layer in model.model.layers]
    before = [block.experts for block in blocks]
    observed = [_Observed(block.experts, block.gate.weight) for block in blocks]
    for block, each in zip(blocks, observed, strict=True):
        block.experts = each
    for ids in windows.split(batch):
        logits = model(input_ids=ids, output_router_logits=False).logits[:, :-1]
        # The sum over tokens, so that derivatives of all batches have one scale.
        nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="sum").backward()
        model.zero_grad()
        for each in observed:
            each.end_batch()
    for block, experts, each in zip(blocks, before, observed, strict=True):
        block.experts = experts
        each.layer.mean_outputs /= each.tokens
    return [each.layer for each in observed]


def damped(moments: Tensor) -> Tensor:
    """Add a share of the mean eigenvalue to moments (..., n, n), in double precision."""
    moments = moments.double()
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    return (1 - _DAMPING) * moments + _DAMPING * mean * eye


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of damped moments, and the roots' inverses."""
    values, vectors = torch.linalg.eigh(damped(moments))
    values = values.clamp_min(1e-30)
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors / values.sqrt()[..., None, :]) @ vectors.mT
    return root, inverse
