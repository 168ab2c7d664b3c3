"""The cost of a method's training step relative to a dense step on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.methods import METHODS
from experiments.training import Run, batch_of, make_step

# Turns before the measured ones.
WARM_UP = 2


def step_cost(run: Run, turns: int, on_step: Callable[[], None]) -> dict[str, Any]:
    """Measure the median time of a method's step relative to a dense step, taken in turn.

    Parameters
    ----------
    run : Run
        Its method is compared with ``"dense"``.
    turns : int
        Measured steps of each model.
    on_step : callable
        Called after every turn.
    """
    with ExitStack() as stack:
        steps = {name: _stepper(run, name, stack) for name in ("dense", run.method)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(WARM_UP + turns):
            for name, step in steps.items():
                seconds[name].append(_timed(step, turn, run.device))
            on_step()
    medians = {name: median(each[WARM_UP:]) for name, each in seconds.items()}
    return {"method": run.method, "time_ratio": medians[run.method] / medians["dense"]}


def _stepper(run: Run, method: str, stack: ExitStack) -> Callable[[int], None]:
    """Return a function that makes one training step of a method, as ``training.train`` does."""
    torch.manual_seed(run.seed)
    dense: PreTrainedModel = run.stage.task.dense(run.data, run.seed)
    model = METHODS[method].model(dense, **run.mixture).train()
    nn.Module.to(model, run.device)
    optimizer = METHODS[method].optimizer(model, run.learning_rate)
    METHODS[method].attach(stack, model, optimizer, run.seed)

    def step(turn: int) -> None:
        make_step(model, optimizer, batch_of(run, turn))

    return step


def _timed(step: Callable[[int], None], turn: int, device: str) -> float:
    start = time.perf_counter()
    step(turn)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
