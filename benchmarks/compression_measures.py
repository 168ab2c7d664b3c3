"""What compression costs a mixture: errors of its matrices, and the held-out loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from compression_calibration import Layer, mixtures, summed_loss
from compression_forms import Experts, Whole
from compression_models import Data, Size, make_step, set_rate
from torch import Tensor, nn
from transformers import MixtralForCausalLM

NAMES = ("up", "gate", "down")
# Batches of healing are none of those that trained the model.
_HEALING = 10_000_000
# Tokens that go through a model at once.
_TOKENS = 4096


def held_out(model: MixtralForCausalLM, windows: Tensor) -> float:
    """Return nats per token, without the first one of each window."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for ids in windows.split(max(1, _TOKENS // windows.shape[1])):
            total += float(summed_loss(model, ids))
    return total / windows[:, 1:].numel()


def with_experts(model: MixtralForCausalLM, compressed: Sequence[Experts]) -> MixtralForCausalLM:
    """Return a copy of a model with other experts; a router keeps the experts that are left."""
    pairs = list(zip(mixtures(model), compressed, strict=True))
    # Entries of this dictionary stand for copies: the model's own experts are not copied first.
    copies = {id(block.experts): copy.deepcopy(experts) for block, experts in pairs}
    changed = copy.deepcopy(model, copies)
    for block, experts in zip(mixtures(changed), compressed, strict=True):
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
    """Train a model, stored factors and scales among its parameters, in place.

    Every method gets the same batches, steps and rate; the routers' balance loss is off, since
    pruned layers have fewer experts.
    """
    model.config.output_router_logits = False
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(steps):
        set_rate(optimizer, rate, step, steps)
        make_step(model, optimizer, data.batch(size, seed, _HEALING + step))
    model.eval()


def probe(
    model: MixtralForCausalLM,
    layers: Sequence[Layer],
    windows: Tensor,
    most: int | None = None,
) -> dict[str, Any]:
    """Show that experts differ, and that routing matters.

    Parameters
    ----------
    model : MixtralForCausalLM
    layers : sequence of Layer
    windows : Tensor
    most : int, optional
        Experts to remove, one at a time, spread evenly over the model; by default all.

    Returns
    -------
    dict
        ``distance``: of experts from their mean, relative to their norm, by matrix. ``load``: the
        share of slots of every expert, by layer. ``without one``: the increase of the loss if one
        expert is missing, (layers, E); its tokens go to the next. It is None for experts that were
        not removed. ``random routing``: the increase with experts drawn at random.
    """
    before = held_out(model, windows)
    distance = {}
    for name in NAMES:
        parts = [getattr(layer, name) for layer in layers]
        missed = sum(float(((p - p.mean(0)) ** 2).sum()) for p in parts)
        distance[name] = (missed / sum(float((p**2).sum()) for p in parts)) ** 0.5
    removed: list[list[float | None]] = [[None] * len(layer.up) for layer in layers]
    for number, expert in spread_pairs(len(layers), len(layers[0].up), most):
        with _without(model, layers[number], number, expert):
            removed[number][expert] = held_out(model, windows) - before
    with random_routing(model):
        by_chance = held_out(model, windows) - before
    load = [(layer.slots / layer.slots.sum()).tolist() for layer in layers]
    return {
        "loss": before, "distance": distance, "load": load, "without one": removed,
        "random routing": by_chance,
    }  # fmt: skip


def spread_pairs(layers: int, experts: int, most: int | None) -> list[tuple[int, int]]:
    """Return some of the experts of a model, as numbers of their layer and in it."""
    total = layers * experts
    places = np.linspace(0, total - 1, min(total, most or total)).round().astype(int)
    return [divmod(place, experts) for place in places.tolist()]


@contextmanager
def _without(model: MixtralForCausalLM, layer: Layer, number: int, expert: int):  # type: ignore[no-untyped-def]
    """Let a model lack one expert of a layer."""
    kept = [each for each in range(len(layer.up)) if each != expert]
    block = mixtures(model)[number]
    before = block.experts, block.gate.weight
    block.experts = Experts(*(Whole(getattr(layer, name)[kept]) for name in NAMES))
    block.gate.weight = nn.Parameter(block.gate.weight.detach()[kept])
    try:
        yield
    finally:
        block.experts, block.gate.weight = before


@contextmanager
def random_routing(model: MixtralForCausalLM):  # type: ignore[no-untyped-def]
    """Let routers choose experts at random; weights stay those of the given choices."""
    draw = torch.Generator().manual_seed(0)

    def shuffle(module: Any, arguments: Any, result: Any) -> Any:
        logits, weights, index = result
        scores = torch.rand(len(index), module.weight.shape[0], generator=draw)
        return logits, weights, scores.topk(index.shape[1], dim=1).indices

    hooks = [block.gate.register_forward_hook(shuffle) for block in mixtures(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
