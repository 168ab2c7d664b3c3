"""What compression costs a mixture: errors of its matrices, and the held-out loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from compression_calibration import Layer
from compression_forms import Experts, Whole
from compression_models import Data, Size, make_step, set_rate
from torch import Tensor, nn
from transformers import MixtralForCausalLM

NAMES = ("up", "gate", "down")
# Batches of healing are none of those that trained the model.
_HEALING = 10_000_000


def held_out(model: MixtralForCausalLM, windows: Tensor, batch: int = 32) -> float:
    """Return nats per token, without the first one of each window."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for ids in windows.split(batch):
            logits = model(input_ids=ids, output_router_logits=False).logits[:, :-1]
            total += float(nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="sum"))
    return total / windows[:, 1:].numel()


def with_experts(model: MixtralForCausalLM, compressed: Sequence[Experts]) -> MixtralForCausalLM:
    """Return a copy of a model with other experts; a router keeps the experts that are left."""
    changed = copy.deepcopy(model)
    for layer, experts in zip(changed.model.layers, compressed, strict=True):
        block: Any = layer.mlp
        block.experts = copy.deepcopy(experts)
        if experts.kept is not None:
            block.gate.weight = nn.Parameter(block.gate.weight.detach()[list(experts.kept)])
    return changed


def errors(layers: Sequence[Layer], compressed: Sequence[Experts]) -> dict[str, float | None]:
    """Return the relative errors of all matrices, and of their outputs on calibration tokens.

    They are None where experts or units are missing.
    """
    sums = np.zeros(4)
    for layer, experts in zip(layers, compressed, strict=True):
        with torch.no_grad():
            built = experts.matrices()
        if built[0].shape != layer.up.shape:
            return {"weights": None, "activations": None}
        for name, matrices in zip(NAMES, built, strict=True):
            given, moments = getattr(layer, name).double(), layer.moments(name).double()
            missed = given - matrices.double()
            for place, each in enumerate((missed, given)):
                sums[place] += float((each**2).sum())
                sums[place + 2] += float(((each @ moments) * each).sum())
    return {
        "weights": float(np.sqrt(sums[0] / sums[1])),
        "activations": float(np.sqrt(max(sums[2], 0) / sums[3])),
    }


def heal(
    model: MixtralForCausalLM, size: Size, data: Data, steps: int, rate: float, seed: int
) -> None:
    """Train all parameters of a model, stored factors and scales among them, in place.

    Every method gets the same batches, steps and rate; the routers' balance loss is off, since
    pruned layers have fewer experts.
    """
    model.config.output_router_logits = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        set_rate(optimizer, rate, step, steps)
        make_step(model, optimizer, data.batch(size, seed, _HEALING + step))
    model.eval()


def probe(model: MixtralForCausalLM, layers: Sequence[Layer], windows: Tensor) -> dict[str, Any]:
    """Show that experts differ, and that routing matters.

    Returns
    -------
    dict
        ``distance``: of experts from their mean, relative to their norm, by matrix. ``load``: the
        share of slots of every expert, by layer. ``without one``: the increase of the loss if one
        expert is missing, (layers, E); its tokens go to the next. ``random routing``: the increase
        with experts drawn at random.
    """
    before = held_out(model, windows)
    distance = {}
    for name in NAMES:
        parts = [getattr(layer, name) for layer in layers]
        missed = sum(float(((p - p.mean(0)) ** 2).sum()) for p in parts)
        distance[name] = (missed / sum(float((p**2).sum()) for p in parts)) ** 0.5
    removed = [
        [held_out(_without(model, layers, number, expert), windows) - before
         for expert in range(len(layers[0].up))]
        for number in range(len(layers))
    ]  # fmt: skip
    with random_routing(model):
        by_chance = held_out(model, windows) - before
    load = [(layer.slots / layer.slots.sum()).tolist() for layer in layers]
    return {
        "loss": before, "distance": distance, "load": load, "without one": removed,
        "random routing": by_chance,
    }  # fmt: skip


def _without(
    model: MixtralForCausalLM, layers: Sequence[Layer], number: int, expert: int
) -> MixtralForCausalLM:
    kept = [each for each in range(len(layers[number].up)) if each != expert]
    changed = copy.deepcopy(model)
    block: Any = changed.model.layers[number].mlp
    layer = layers[number]
    block.experts = Experts(*(Whole(getattr(layer, name)[kept]) for name in NAMES))
    block.gate.weight = nn.Parameter(block.gate.weight.detach()[kept])
    return changed


@contextmanager
def random_routing(model: MixtralForCausalLM):  # type: ignore[no-untyped-def]
    """Let routers choose experts at random; weights stay those of the given choices."""
    draw = torch.Generator().manual_seed(0)

    def shuffle(module: Any, arguments: Any, result: Any) -> Any:
        logits, weights, index = result
        scores = torch.rand(len(index), module.weight.shape[0], generator=draw)
        return logits, weights, scores.topk(index.shape[1], dim=1).indices

    hooks = [layer.mlp.gate.register_forward_hook(shuffle) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
