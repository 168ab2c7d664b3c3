"""One run: build a model, train it, evaluate it. After a crash it continues where it was."""

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

# Share of the steps in which the learning rate rises; afterwards it falls linearly to zero.
_WARMUP = 0.1
_CLIP = 1.0
# A crash loses at most this much work.
_CHECKPOINT_SECONDS = 60.0
# Number of batches, beyond those of training, that measure the routers' load.
_LOAD_BATCHES = 4


@dataclass(frozen=True)
class Run:
    """The inputs of a run.

    Attributes
    ----------
    stage : Stage
    method : str
    learning_rate : float
    seed : int
    mixture : dict
        Settings of :class:`tnmoe.hf.MPOEConfig` for all methods.
    data : Path
        Folder of the prepared data.
    device : str
    model_folder : Path, optional
        Folder to save the model in.
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
    """Train and evaluate a model; return the results.

    Parameters
    ----------
    run : Run
    checkpoint : Path
        File for the state of an unfinished run.
    on_step : callable
        Called after every step, and once for every step that the checkpoint contains.
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
    load_batches = [batch_of(run, run.stage.steps + index) for index in range(_LOAD_BATCHES)]
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
        "load": router_load(model, load_batches),
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
    """Train; return the seconds of every step."""
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
            # Dropout and the routers' noise are functions of seed and step as well.
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
    """Make one step of training with clipped gradients; return the loss before it."""
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    return loss.detach()


def _schedule(step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak; it is positive at every step."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def batch_of(run: Run, step: int) -> Batch:
    """Return the batch of a run's step, on the run's device."""
    batch = run.stage.task.batch(run.data, step, run.seed)
    return {name: tensor.to(run.device) for name, tensor in batch.items()}


def _save(path: Path, parts: dict[str, Any], seconds: list[float]) -> None:
    """Write a checkpoint under another name first, so that no partial one has its name."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"seconds": seconds}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _restore(path: Path, parts: dict[str, Any]) -> list[float]:
    """Load a checkpoint, if there is one; return the seconds of its steps."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["seconds"]


def _peak_bytes(device: str) -> int:
    """Return the peak memory so far: of a CUDA device, or of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
