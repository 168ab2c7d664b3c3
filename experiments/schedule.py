"""All runs of some settings, each in a process of its own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from experiments.costs import WARM_UP, step_cost
from experiments.folder import SettingFolder, write
from experiments.settings import Setting
from experiments.training import Run, train
from tnmoe.system.progress import progress_bar

# Loaded once, and inherited by every run.
_PRELOADED = ["experiments.schedule", "experiments.settings"]
_POLL_SECONDS = 0.2

# What makes the results of a file, given what to call after every step.
Make = Callable[[Callable[[], None]], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes
    ----------
    path : Path
        File of the results; nothing is to do once it is there.
    make : callable
        Picklable.
    steps : int
        How often it calls what it is given.
    name : str
        For people.
    """

    path: Path
    make: Make
    steps: int
    name: str


def training_jobs(folders: Sequence[SettingFolder], device: str) -> Iterator[Job]:
    """Runs that can be made now and are not: of all settings the first methods first.

    What is to be done is read from the files that are there, and so is known again after a crash.
    """
    for folder in folders:
        yield from _pretraining_jobs(folder, device)
    for place in range(max(len(folder.setting.methods) for folder in folders)):
        for folder in folders:
            for method in folder.setting.methods[place : place + 1]:
                yield from _method_jobs(folder, method, device)


def _pretraining_jobs(folder: SettingFolder, device: str) -> Iterator[Job]:
    stage = folder.setting.pretraining
    for seed in range(folder.setting.seeds):
        if stage is not None and not folder.is_pretrained(seed):
            model = folder.pretrained(seed)
            data = folder.data("pretraining")
            rate = stage.learning_rates[0]
            curve = folder.curve("pretraining", rate, seed)
            run = Run(stage, "dense", rate, seed, {}, data, device, model, curve)
            name = f"{folder.setting.name}: pretraining, seed {seed}"
            yield _training_job(model.with_suffix(".json"), run, name)


def _method_jobs(folder: SettingFolder, method: str, device: str) -> Iterator[Job]:
    """All learning rates with the first seeds; the best with the others, once it is known."""
    setting = folder.setting
    best = folder.best_rate(method)
    first = range(setting.tuning_seeds)
    tried = [(rate, seed) for seed in first for rate in setting.stage.learning_rates]
    others = [] if best is None else [(best, seed) for seed in range(len(first), setting.seeds)]
    for rate, seed in (*tried, *others):
        path = folder.result(method, rate, seed)
        if not path.exists() and folder.is_pretrained(seed):
            name = f"{setting.name}: {method}, {rate:g}, seed {seed}"
            yield _training_job(path, _run(folder, method, rate, seed, device), name)


def cost_jobs(folder: SettingFolder, device: str) -> Iterator[Job]:
    """Measurements of what a step costs that are not made."""
    rate = folder.setting.stage.learning_rates[0]
    for method in folder.setting.methods:
        path = folder.cost(method)
        if method != "dense" and not path.exists() and folder.is_pretrained(0):
            run = _run(folder, method, rate, 0, device)
            name = f"{folder.setting.name}: {method}"
            turns = folder.setting.cost_turns
            yield Job(path, partial(step_cost, run, turns), WARM_UP + turns, name)


def _run(folder: SettingFolder, method: str, rate: float, seed: int, device: str) -> Run:
    setting = folder.setting
    data, curve = folder.data("main"), folder.curve(method, rate, seed)
    mixture = dict(setting.mixture)
    return Run(setting.stage, method, rate, seed, mixture, data, device, curve=curve)


def _training_job(path: Path, run: Run, name: str) -> Job:
    make = partial(train, run, path.with_suffix(".checkpoint"))
    return Job(path, make, run.stage.steps, name)


def total_steps(setting: Setting) -> int:
    """Steps of all runs, made or not."""
    tried = len(setting.stage.learning_rates) * setting.tuning_seeds
    runs = len(setting.methods) * (tried + setting.seeds - setting.tuning_seeds)
    before = setting.pretraining.steps * setting.seeds if setting.pretraining else 0
    return before + runs * setting.stage.steps


def steps_made(folder: SettingFolder) -> int:
    """Steps of the runs that are there."""
    setting = folder.setting
    before = setting.pretraining.steps if setting.pretraining else 0
    pretrained = sum(folder.is_pretrained(seed) for seed in range(setting.seeds))
    return before * pretrained + len(folder.run_files()) * setting.stage.steps


def run_all(folders: Sequence[SettingFolder], device: str, jobs: int, threads: int) -> list[str]:
    """Make all runs; then, one at a time, measure what steps cost.

    Returns
    -------
    list of str
        What went wrong with runs that failed; the others were made nevertheless.
    """
    transformers.logging.disable_progress_bar()  # of files loaded and saved; settings are counted
    for folder in progress_bar(folders, desc="preparing data", unit="setting"):
        folder.prepare()

    def training() -> Iterator[Job]:
        return training_jobs(folders, device)

    def costs() -> Iterator[Job]:
        for folder in folders:
            yield from cost_jobs(folder, device)

    processes = _Processes(device, threads)
    made = sum(steps_made(folder) for folder in folders)
    total = sum(total_steps(folder.setting) for folder in folders)
    steps = partial(progress_bar, unit="step", smoothing=0.05)
    with steps(desc="training", total=total, initial=made) as trained:
        _work_off(training, processes, jobs, trained)
    with steps(desc="measuring steps", total=sum(job.steps for job in costs())) as measured:
        _work_off(costs, processes, 1, measured)
    return processes.failures


def _work_off(
    left: Callable[[], Iterator[Job]], processes: _Processes, limit: int, shown: tqdm
) -> None:
    """Start what is left until nothing is, a limited number at a time."""
    before = shown.n - processes.steps()
    try:
        while True:
            processes.collect()
            free = (job for job in left() if job.path not in processes.known)
            while len(processes.running) < limit and (job := next(free, None)) is not None:
                processes.start(job)
            shown.update(before + processes.steps() - shown.n)
            if not processes.running:
                return
            shown.set_postfix_str(processes.names())
            time.sleep(_POLL_SECONDS)
    finally:
        processes.stop()


class _Processes:
    """Processes under way."""

    def __init__(self, device: str, threads: int) -> None:
        self.threads = threads
        self.running: dict[Path, BaseProcess] = {}
        self.known: set[Path] = set()
        self.failures: list[str] = []
        # CUDA does not survive a fork; elsewhere loading the libraries once saves seconds a run.
        method = "forkserver" if sys.platform != "win32" and device == "cpu" else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._done = self._context.Value("q", 0)

    def start(self, job: Job) -> None:
        path = job.path
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = (job, self._done, self.threads)
        process = self._context.Process(target=_do, args=arguments, name=job.name)
        process.start()
        self.running[path] = process
        self.known.add(path)

    def collect(self) -> None:
        """Forget what has ended."""
        for path, process in list(self.running.items()):
            if process.exitcode is None:
                continue
            del self.running[path]
            if not path.exists():
                error = path.with_suffix(".error")
                why = error.read_text() if error.exists() else f"exit status {process.exitcode}"
                self.failures.append(f"{process.name}: {why.strip()}")

    def steps(self) -> int:
        return self._done.value

    def names(self) -> str:
        return "; ".join(process.name for process in self.running.values())

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join()


def _do(job: Job, done: Any, threads: int) -> None:
    """A job, in a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's to handle
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parent = multiprocessing.parent_process()

    def on_step() -> None:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # killed: nobody waits for this process any more
        with done.get_lock():
            done.value += 1

    try:
        write(job.path, job.make(on_step))
    except Exception:
        job.path.with_suffix(".error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    for suffix in (".checkpoint", ".error"):
        job.path.with_suffix(suffix).unlink(missing_ok=True)
