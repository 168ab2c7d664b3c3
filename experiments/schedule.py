"""All runs of the chosen settings: each in a process of its own, several at a time."""

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

# The fork server loads these once, and every run inherits them.
_PRELOADED = ["experiments.schedule", "experiments.settings"]
_POLL_SECONDS = 0.2

# Makes the results of a file; its argument is a function to call after every step.
Make = Callable[[Callable[[], None]], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes
    ----------
    path : Path
        File of the results. Once it exists, the job is done.
    make : callable
        Makes the results; picklable.
    steps : int
        How often ``make`` calls its argument.
    name : str
        Name to show to people.
    """

    path: Path
    make: Make
    steps: int
    name: str


def training_jobs(folders: Sequence[SettingFolder], device: str) -> Iterator[Job]:
    """Iterate over the runs that can start now, the first methods of all settings first.

    The existing files say which runs are done, so that a crash loses nothing.
    """
    for folder in folders:
        yield from _pretraining_jobs(folder, device)
    for position in range(max(len(folder.setting.methods) for folder in folders)):
        for folder in folders:
            for method in folder.setting.methods[position : position + 1]:
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
    """Iterate over runs of all learning rates with the tuning seeds, then of the best rate."""
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
    """Iterate over the missing measurements of what a step costs."""
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
    """Count the steps of all runs of a setting."""
    tried = len(setting.stage.learning_rates) * setting.tuning_seeds
    runs = len(setting.methods) * (tried + setting.seeds - setting.tuning_seeds)
    before = setting.pretraining.steps * setting.seeds if setting.pretraining else 0
    return before + runs * setting.stage.steps


def steps_made(folder: SettingFolder) -> int:
    """Count the steps of the runs that have results."""
    setting = folder.setting
    before = setting.pretraining.steps if setting.pretraining else 0
    pretrained = sum(folder.is_pretrained(seed) for seed in range(setting.seeds))
    return before * pretrained + len(folder.run_files()) * setting.stage.steps


def run_all(folders: Sequence[SettingFolder], device: str, jobs: int, threads: int) -> list[str]:
    """Make all runs; then measure the costs of steps, one method at a time.

    Returns
    -------
    list of str
        The errors of the runs that failed. They do not stop the remaining runs.
    """
    transformers.logging.disable_progress_bar()  # of loading and saving; our bars count settings
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
        _run_jobs(training, processes, jobs, trained)
    with steps(desc="measuring steps", total=sum(job.steps for job in costs())) as measured:
        _run_jobs(costs, processes, 1, measured)
    return processes.failures


def _run_jobs(
    remaining: Callable[[], Iterator[Job]], processes: _Processes, limit: int, progress: tqdm
) -> None:
    """Run all remaining jobs, a limited number at a time."""
    before = progress.n - processes.steps()
    try:
        while True:
            processes.collect()
            new = (job for job in remaining() if job.path not in processes.known)
            while len(processes.running) < limit and (job := next(new, None)) is not None:
                processes.start(job)
            progress.update(before + processes.steps() - progress.n)
            if not processes.running:
                return
            progress.set_postfix_str(processes.names())
            time.sleep(_POLL_SECONDS)
    finally:
        processes.stop()


class _Processes:
    """The running processes."""

    def __init__(self, device: str, threads: int) -> None:
        self.threads = threads
        self.running: dict[Path, BaseProcess] = {}
        self.known: set[Path] = set()
        self.failures: list[str] = []
        # CUDA does not survive a fork. Without CUDA a fork server saves seconds of loading per run.
        method = "forkserver" if sys.platform != "win32" and device == "cpu" else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._done = self._context.Value("q", 0)

    def start(self, job: Job) -> None:
        path = job.path
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = (job, self._done, self.threads)
        process = self._context.Process(target=_run_job, args=arguments, name=job.name)
        process.start()
        self.running[path] = process
        self.known.add(path)

    def collect(self) -> None:
        """Drop the processes that ended, and note their errors."""
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


def _run_job(job: Job, done: Any, threads: int) -> None:
    """Run a job in a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles it
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parent = multiprocessing.parent_process()

    def on_step() -> None:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the command was killed, and this run must not outlive it
        with done.get_lock():
            done.value += 1

    try:
        write(job.path, job.make(on_step))
    except Exception:
        job.path.with_suffix(".error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    for suffix in (".checkpoint", ".error"):
        job.path.with_suffix(suffix).unlink(missing_ok=True)
