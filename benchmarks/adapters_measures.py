"""Training of an adapter, its held-out results, how it routes, time and memory of a step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean, median
from typing import Any

import torch
from adapters_methods import REFERENCE, attach, fresh, trained_parameters
from adapters_settings import Setting
from compression_models import set_rate
from library import OnTorch
from machine import PeakMemory, set_threads, take_turns
from torch import Tensor

from experiments.task import Batch
from tnmoe import nn

_CLIP = 1.0
# Results of a domain that the tables show.
_METRICS = ("loss", "accuracy")


def train(adapted: Any, setting: Setting, seed: int, rate: float, steps: int) -> None:
    """Train an adapter; the rate rises, and then falls linearly to a tenth."""
    optimizer = new_optimizer(adapted, rate)
    adapted.train()
    for step in range(steps):
        set_rate(optimizer, rate, step, steps)
        make_step(adapted, optimizer, setting.batch(step, seed))
    adapted.eval()


def new_optimizer(adapted: Any, rate: float) -> torch.optim.Optimizer:
    """Return AdamW without weight decay on what training changes."""
    return torch.optim.AdamW(trained_parameters(adapted), lr=rate, weight_decay=0.0)


def make_step(adapted: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Make one step with clipped gradients."""
    optimizer.zero_grad()
    adapted(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained_parameters(adapted), _CLIP)
    optimizer.step()


def held_out(model: Any, setting: Setting, split: str) -> tuple[dict[str, Any], float | None]:
    """Return results of every domain, with the mean loss as ``loss``, and the routing distance.

    A loss is None where training diverged, and the distance where nothing is routed.
    """
    results, loads = {}, []
    for domain in setting.domains:
        with nn.record_routing(model) as routing:
            found = setting.evaluate(model, domain, split)
        results |= {f"{domain} {key}": _finite(found[key]) for key in _METRICS if key in found}
        loads.append(loads_of(routing))
    losses = [results[f"{domain} loss"] for domain in setting.domains]
    results["loss"] = None if None in losses else fmean(losses)
    return results, routing_distance(loads)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def loads_of(routing: nn.Routing) -> dict[str, Tensor]:
    """Return the share of all slots that each expert receives, by routers with a choice.

    Padding counts. Sentences of similar lengths share a batch, so there is little.
    """
    counts: dict[str, Tensor] = {}
    for call in (each for each in routing.calls if each.logits.shape[1] > 1):
        found = call.chosen.flatten().bincount(minlength=call.logits.shape[1]).double()
        counts[call.name] = counts.get(call.name, torch.zeros_like(found)) + found
    return {name: each / each.sum() for name, each in counts.items()}


def routing_distance(loads: Sequence[dict[str, Tensor]]) -> float | None:
    """Return how differently two domains are routed; None without routers.

    The total-variation distance between the loads of the domains, as a mean over routers: 0 if the
    loads are equal, 1 if no expert sees both domains. Of more domains, the mean over pairs.
    """
    distances = [
        float((a[name] - b[name]).abs().sum()) / 2
        for a, b in itertools.combinations(loads, 2)
        for name in a
    ]
    return fmean(distances) if distances else None


def step_seconds(
    name: str, base: Any, setting: Setting, sizes: dict[str, int], turns: int
) -> dict[str, float]:
    """Return median seconds of a training step of a method and of LoRA, measured in turns."""
    batch = setting.batch(0, 0)
    calls = {}
    for key, method in (("seconds", name), ("LoRA seconds", REFERENCE)):
        adapted = attach(method, fresh(base, setting), setting, sizes[method], 0).train()
        call = _Step(adapted, batch)
        call()
        start = time.perf_counter()
        call()
        calls[key] = call, time.perf_counter() - start
    times = take_turns(calls, OnTorch("cpu"), turns)
    return {key: median(each) for key, each in times.items()}


def step_bytes(name: str, setting: Setting, size: int) -> int:
    """Return the peak memory of training, above that of the base model, in a new process.

    It holds the adapter, its gradients, AdamW's averages, and what a step keeps of the batch.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_of_steps, name, setting, size).result()


def _peak_of_steps(name: str, setting: Setting, size: int) -> int:
    set_threads()
    base, batch = setting.base(0), setting.batch(0, 0)
    with torch.no_grad():
        base(**batch)  # the first products load libraries, whose memory belongs to no adapter
    with PeakMemory("cpu") as memory:
        step = _Step(attach(name, base, setting, size, 0).train(), batch)
        step()
        step()
    return memory.peak


class _Step:
    """A training step on one batch, again and again."""

    def __init__(self, adapted: Any, batch: Batch) -> None:
        self.adapted, self.batch = adapted, batch
        self.optimizer = new_optimizer(adapted, 1e-4)

    def __call__(self) -> None:
        make_step(self.adapted, self.optimizer, self.batch)
