"""What calibration tokens show of the experts of a mixture: moments, loads, outputs, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compression_models import save
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from tnmoe.hf import CompressionConfig
from tnmoe.hf.calibration import LayerMoments
from tnmoe.hf.compress import collect_moments
from tnmoe.hf.ordinary import find_ordinary

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
    gradients : Tensor, shape (E, H, H)
        Σ g gᵀ of the loss's derivatives by the outputs of ``down``.
    fisher : dict of str to Tensor, shape (E,)
        Mean squared derivatives by the matrices, summed over batches.
    seen : LayerMoments
        What a calibration of the library notes.
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
    gradients: Tensor
    fisher: dict[str, Tensor]
    seen: LayerMoments

    @property
    def numbers(self) -> int:
        """Numbers of all matrices."""
        return self.up.numel() + self.gate.numel() + self.down.numel()

    def moments(self, name: str) -> Tensor:
        """Return the moments of the inputs of a matrix."""
        return self.hidden if name == "down" else self.inputs


class _Observed(nn.Module):
    """The experts of a layer, which note what they see.

    Their matrices are the model's own, since copies of large ones would not fit into memory.
    """

    def __init__(self, experts: Any, router: Tensor, seen: LayerMoments) -> None:
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        weights = {"up": up, "gate": gate, "down": experts.down_proj.detach()}
        self.weights = {name: each.detach().requires_grad_() for name, each in weights.items()}
        for name, each in self.weights.items():
            each.register_post_accumulate_grad_hook(self._squares_adder(name))
        count, size, width = up.shape
        zeros = torch.zeros
        self.layer = Layer(
            **weights,
            router=router.detach().clone(),
            inputs=zeros(count, width, width), hidden=zeros(count, size, size),
            slots=zeros(count), activation=zeros(count), mean_outputs=zeros(count, width),
            gradients=zeros(count, width, width),
            fisher={name: zeros(count) for name in weights}, seen=seen,
        )  # fmt: skip
        self.tokens = 0

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as ``MixtralExperts``, and note moments."""
        result = torch.zeros_like(states)
        layer = self.layer
        # Tensors that zip takes apart as a whole have one derivative, and not one per expert.
        for expert, matrices in enumerate(zip(*self.weights.values(), strict=True)):
            token, place = torch.where(index == expert)
            inputs, share = states[token], weights[token, place, None]
            hidden, outputs = _apply(inputs, *matrices)
            outputs.register_hook(self._adder(layer.gradients, expert))
            with torch.no_grad():
                layer.inputs[expert] += inputs.mT @ inputs
                layer.hidden[expert] += hidden.mT @ hidden
                layer.slots[expert] += len(token)
                layer.activation[expert] += (share * outputs).norm(dim=1).sum()
                layer.mean_outputs[expert] += _apply(states, *matrices)[-1].sum(0)
            result = result.index_add(0, token, outputs * share)
        self.tokens += len(states)
        return result

    @staticmethod
    def _adder(total: Tensor, expert: int):  # type: ignore[no-untyped-def]
        def add(gradient: Tensor) -> None:
            total[expert] += gradient.mT @ gradient

        return add

    def _squares_adder(self, name: str):  # type: ignore[no-untyped-def]
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            self.layer.fisher[name] += weight.grad.square().mean((1, 2))
            weight.grad = None

        return add


def _apply(inputs: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """Compute an expert; return its hidden units and its outputs."""
    hidden = nn.functional.silu(inputs @ gate.mT) * (inputs @ up.mT)
    return hidden, hidden @ down.mT


def mixtures(model: MixtralForCausalLM) -> list[Any]:
    """Return the blocks of a model that have experts; other layers may have one network."""
    blocks: list[Any] = [layer.mlp for layer in model.model.layers]
    return [block for block in blocks if hasattr(block, "experts")]


def calibrated(file: Path, model: MixtralForCausalLM, windows: Tensor, batch: int) -> list[Layer]:
    """Return layers from a file, or calibrate them and store them there.

    The file stays mapped: memory holds what a method reads, and nothing while a model heals.
    """
    if not file.exists():
        found = calibrate(model, windows, batch)
        save({"layers": [vars(each) | {"seen": vars(each.seen)} for each in found]}, file)
    stored = torch.load(file, weights_only=True, mmap=True)["layers"]
    layers = [Layer(**each | {"seen": LayerMoments(**each["seen"])}) for each in stored]
    last, block = layers[-1], mixtures(model)[-1]
    slots = windows.numel() * model.config.num_experts_per_tok
    if not torch.equal(last.down, block.experts.down_proj) or last.slots.sum() != slots:
        raise SystemExit(f"{file} holds a calibration of another model or other windows: delete it")
    return layers


def calibrate(model: MixtralForCausalLM, windows: Tensor, batch: int = 8) -> list[Layer]:
    """Send windows through a model, and return what its experts saw. The model stays as it is."""
    blocks = mixtures(model)
    before = [block.experts for block in blocks]
    seen = _seen(model, windows, batch)
    observed = [
        _Observed(block.experts, block.gate.weight, moments)
        for block, moments in zip(blocks, seen, strict=True)
    ]
    for block, each in zip(blocks, observed, strict=True):
        block.experts = each
    for ids in windows.split(batch):
        # The sum over tokens, so that derivatives of all batches have one scale.
        summed_loss(model, ids).backward()
        model.zero_grad()
    for block, experts, each in zip(blocks, before, observed, strict=True):
        block.experts = experts
        each.layer.mean_outputs /= each.tokens
    return [each.layer for each in observed]


def _seen(model: MixtralForCausalLM, windows: Tensor, batch: int) -> list[LayerMoments]:
    """Return the moments that the library's own calibration notes, layer by layer."""
    batches = [{"input_ids": ids} for ids in windows.split(batch)]
    experts = find_ordinary(model)
    found = collect_moments(model, experts, batches, CompressionConfig(keep=0.5))
    return [found[each.name] for each in experts]


def summed_loss(model: MixtralForCausalLM, ids: Tensor) -> Tensor:
    """Return the sum of the losses of all tokens but the first one of each window."""
    logits = model(input_ids=ids, output_router_logits=False).logits[:, :-1]
    # A large vocabulary takes a third of the time in rows.
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def damped(moments: Tensor) -> Tensor:
    """Add a share of the mean eigenvalue to moments (..., n, n), in double precision."""
    moments = moments.double()
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    return (1 - _DAMPING) * moments + _DAMPING * mean * eye


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return roots R of damped moments, R Rᵀ, and the roots' inverses.

    They are triangular: Cholesky's decomposition takes a fifth of the time that symmetric roots do,
    and the forms of low rank that follow from them are the same.
    """
    if moments.ndim > 2 and moments.stride(0) == 0:
        # One matrix that stands for all experts, such as the identity.
        moments = moments[:1]
    root = torch.linalg.cholesky(damped(moments))
    eye = torch.eye(root.shape[-1], dtype=root.dtype)
    return root, torch.linalg.solve_triangular(root, eye, upper=False)
