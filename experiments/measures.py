"""Measures of a model beside its losses: parameters, drift, router load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.task import Batch
from experiments.variants import cores_of, mixtures, owned_parameters
from tnmoe.nn import RoutingCall, record_routing


def total_parameters(model: nn.Module) -> int:
    """Count all parameters, tied ones once."""
    return sum(each.numel() for each in model.parameters())


def active_parameters(model: nn.Module) -> int:
    """Count the parameters that one token uses: all but those of the experts that it skips."""
    idle = 0
    for layer in mixtures(model):
        experts: Any = layer.experts
        router: Any = layer.router
        owned = sum(each.numel() for each in owned_parameters(layer))
        idle += owned // experts.num_experts * (experts.num_experts - router.top_k)
    return total_parameters(model) - idle


class Drift:
    """The distance that cores of experts move, relative to their norm at the start."""

    def __init__(self, model: nn.Module) -> None:
        self._start = {
            kind: [each.detach().clone() for each in cores]
            for kind, cores in cores_of(model).items()
        }

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the root mean square over shared cores, and over cores that experts own."""
        drift = {}
        for kind, cores in cores_of(model).items():
            if cores:
                moved = [_moved(*pair) for pair in zip(self._start[kind], cores, strict=True)]
                drift[kind] = float(torch.stack(moved).mean().sqrt())
        return drift


def _moved(old: Tensor, new: Tensor) -> Tensor:
    """Return the square of the relative change."""
    return ((new.detach() - old).norm() / old.norm()).double() ** 2


def router_load(model: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """Measure every expert's share of the slots per layer, and how even the shares are.

    ``evenness`` is the entropy of a layer's shares divided by that of equal shares, averaged over
    layers. The result is empty for dense models.
    """
    if not mixtures(model):
        return {}
    counts = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            with record_routing(model) as routing:
                model(**batch)
            counts.append(torch.stack([_counts(call, batch) for call in routing.calls]))
    model.train(training)
    total = torch.stack(counts).sum(0)
    shares = total / total.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
    evenness = entropy / torch.log(torch.tensor(float(shares.shape[-1])))
    return {
        "shares": [[round(each, 4) for each in layer] for layer in shares.tolist()],
        "evenness": float(evenness.mean()),
        "largest_share": float(shares.max()),
    }


def _counts(call: RoutingCall, batch: Batch) -> Tensor:
    """Count the slots per expert in a call, without padding where the batch has its mask."""
    mask = batch.get("attention_mask")
    # In an encoder-decoder the mask covers the encoder's tokens, not the decoder's.
    fits = mask is not None and mask.numel() == len(call.index)
    return call.slots_per_expert(mask if fits else None).double()
