"""One run: build a model, train it, evaluate it. Killed at any time, it goes on where it was."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.curves import Curve
from experiments.measures import Drift, active_parameters, router_load, total_parameters
from experiments.methods import METHODS
from experiments.settings import Stage
from experiments.task import SPLITS, Batch
from tnmoe.system.durable import sync

# Share of the steps over which the learning rate rises; it then falls to zero in a line.
_WARMUP = 0.1
_CLIP = 1.0
# Losing more than this to a crash would hurt.
_CHECKPOINT_SECONDS = 60.0
# Batches beyond those of training, on which the routers' load is looked at.
_LOOKED_AT = 4


@dataclass(frozen=True)
class Run:
    """Everything that a run depends on.

    Attributes
    ----------
    stage : Stage
    method : str
    learning_rate : float
    seed : int
    mixture : dict
        Settings that the methods of a setting have in common.
    data : Path
        Folder of the prepared data.
    device : str
    model_folder : Path, optional
        Where to save the model.
    curve : Path, optional
        Folder for the losses of all steps.
    """

    stage: Stage
    method: str
    learning_rate: float
    seed: int
    mixture: dict[str, Any]
    data: Path
    device: str = "cpu"
    model_folder: Path | None = None
    curve: Path | None = None


def train(run: Run, checkpoint: Path, on_step: Callable[[], None]) -> dict[str, Any]:
    """Results of a run.

    Parameters
    ----------
    run : Run
    checkpoint : Path
        Where the state of an unfinished run is kept.
    on_step : callable
        Called after every step, also for those that a checkpoint has already made.
    """
    task, method = run.stage.task, METHODS[run.method]
    at_start = _peak_bytes(run.device)
    torch.manual_seed(run.seed)
    model = method.model(task.dense(run.data, run.seed), **run.mixture)
    nn.Module.to(model, run.device)  # transformers' own is typed for less
    drift = Drift(model)
    before = task.evaluate(model, run.data, "test")
    optimizer = method.optimizer(model, run.learning_rate)
    with ExitStack() as stack:
        mask = method.attach(stack, model, optimizer, run.seed)
        seconds = _steps(run, model, optimizer, mask, checkpoint, on_step)
    if run.model_folder is not None:
        model.save_pretrained(run.model_folder)
    looked_at = [batch_of(run, run.stage.steps + index) for index in range(_LOOKED_AT)]
    return {
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "steps": run.stage.steps,
        "parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        "before": before,
        **{split: task.evaluate(model, run.data, split) for split in SPLITS},
        "drift": drift.measure(model),
        "load": router_load(model, looked_at),
        "masked_steps": mask.masked_steps if mask else 0,
        "seconds_per_step": median(seconds),
        "peak_bytes": _peak_bytes(run.device) - at_start,
    }


def _steps(
    run: Run,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    mask: Any,
    checkpoint: Path,
    on_step: Callable[[], None],
) -> list[float]:
    """Train; seconds of every step."""
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    parts = {"model": model, "optimizer": optimizer} | ({"mask": mask} if mask else {})
    seconds = _restore(checkpoint, parts)
    for _ in seconds:
        on_step()
    model.train()
    saved = time.monotonic()
    with Curve(run.curve, len(seconds)) as curve:
        for step in range(len(seconds), run.stage.steps):
            start = time.perf_counter()
            # Dropout and the routers' noise, too, are functions of seed and step.
            torch.manual_seed(run.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, run.stage.steps)
            loss = make_step(model, optimizer, batch_of(run, step))
            seconds.append(time.perf_counter() - start)
            curve.add(step, loss)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                _save(checkpoint, parts, seconds)
                saved = time.monotonic()
            on_step()
    return seconds


def make_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step of training: forward, backward, clipped, updated; the loss before it."""
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    return loss.detach()


def _schedule(step: int, steps: int) -> float:
    """The learning rate as a share of its peak; above zero at every step."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def batch_of(run: Run, step: int) -> Batch:
    """What a step of a run sees, on its device."""
    batch = run.stage.task.batch(run.data, step, run.seed)
    return {name: tensor.to(run.device) for name, tensor in batch.items()}


def _save(path: Path, parts: dict[str, Any], seconds: list[float]) -> None:
    """All or nothing: a half-written checkpoint never has the name of a whole one."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"seconds": seconds}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _restore(path: Path, parts: dict[str, Any]) -> list[float]:
    """Seconds of the steps already made."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["seconds"]


def _peak_bytes(device: str) -> int:
    """Largest memory so far: of the device where it has its own, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
