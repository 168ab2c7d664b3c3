"""Fine-tuning and evaluation of one form of the model, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from tnmoe import hf
from tnmoe.demo.data import Sentences
from tnmoe.demo.models import load_form, load_tokenizer, quiet_transformers
from tnmoe.nn import GradientMask, record_routing
from tnmoe.system.progress import end_line, progress_bar

# Longer sentences are cut; reviews of one sentence are shorter.
MAX_TOKENS = 128
# Held-out sentences on which a converted or reloaded model is checked.
CHECKED_SENTENCES = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """All that a fine-tuning run depends on."""

    kind: str
    model: Path
    train: Sentences
    held_out: Sentences
    config: hf.MPOEConfig
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses and correctness, sentence by sentence, and slots per layer and expert."""

    losses: np.ndarray
    correct: np.ndarray
    expert_counts: np.ndarray | None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


@dataclass(frozen=True)
class Result:
    """Results and costs of a fine-tuning run."""

    kind: str
    parameters: int
    before: Evaluation
    after: Evaluation
    losses: list[float]
    step_seconds: list[float]
    peak_bytes: int
    masked_steps: int
    checkpoint_logits: np.ndarray | None = None

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a step; NaN without a step."""
        return float(np.median(self.step_seconds)) if self.step_seconds else float("nan")


def run_in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process, so that its peak memory is its own.

    Only this process handles Ctrl-C. The new process never sees the signal, and this one ends it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_keep_progress_private) as pool:
        try:
            with _interrupts_deferred():
                future = pool.submit(function, *arguments)
            return future.result()
        except BrokenProcessPool as error:
            raise MemoryError("a process of the demo was killed, probably for memory") from error
        except (KeyboardInterrupt, SystemExit):
            for process in multiprocessing.active_children():
                process.terminate()
            end_line()
            raise


def _keep_progress_private() -> None:
    """Give progress bars a lock within this process; a shared lock would outlive the process."""
    tqdm.set_lock(threading.RLock())


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C until the block ends, and block it in every process that starts in the block."""
    # Starting multiprocessing's tracker unblocks signals, so it comes first.
    resource_tracker.ensure_running()
    seen: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    # The handler protects this process while it starts another. The other process inherits the
    # blocked signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if seen:
        raise KeyboardInterrupt


def fine_tune(job: Job) -> Result:
    """Evaluate, fine-tune and evaluate again; save the model if the job names a checkpoint."""
    tokenizer = load_tokenizer(job.model)
    model = load_form(job.kind, job.model, job.train.label_names, job.config, job.seed)
    torch.nn.Module.to(model, job.device)
    before = evaluate(model, tokenizer, job.held_out, job.batch_size, f"{job.kind}: before")
    losses, seconds, masked_steps = _train(model, tokenizer, job)
    after = evaluate(model, tokenizer, job.held_out, job.batch_size, f"{job.kind}: after")
    peak = _peak_bytes(job.device)
    checkpoint_logits = None
    if job.checkpoint is not None:
        try:
            model.save_pretrained(job.checkpoint)
            tokenizer.save_pretrained(job.checkpoint)
        except SafetensorError as error:  # Rust's own error, for a full disk for example
            raise OSError(f"cannot write the checkpoint: {error}") from error
        checkpoint_logits = predict(model.cpu(), tokenizer, job.held_out.texts[:CHECKED_SENTENCES])
    return Result(
        kind=job.kind,
        parameters=model.num_parameters(),
        before=before,
        after=after,
        losses=losses,
        step_seconds=seconds,
        peak_bytes=peak,
        masked_steps=masked_steps,
        checkpoint_logits=checkpoint_logits,
    )


def _train(
    model: PreTrainedModel, tokenizer: Any, job: Job
) -> tuple[list[float], list[float], int]:
    """Train the model; return every step's loss and seconds, and the number of masked steps."""
    torch.manual_seed(job.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, job.steps // 10, job.steps)
    losses, seconds = [], []
    mask = None
    with ExitStack() as stack:
        if job.kind == "MPOE":
            probability = job.config.mask_probability
            mask = stack.enter_context(GradientMask(optimizer, model, probability, seed=job.seed))
        batches = _batches(len(job.train), job.batch_size, job.seed)
        bar = progress_bar(range(job.steps), desc=f"{job.kind}: fine-tuning", unit="step")
        for _ in bar:
            start = time.perf_counter()
            inputs, labels = _encode(tokenizer, job.train, next(batches), job.device)
            loss = _step_loss(model, inputs, labels, job)
            optimizer.zero_grad()
            loss["total"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss["task"].detach()))
            seconds.append(time.perf_counter() - start)
            bar.set_postfix(refresh=False, loss=f"{np.mean(losses[-20:]):.3f}")
    return losses, seconds, 0 if mask is None else mask.masked_steps


def _step_loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, job: Job
) -> dict[str, Tensor]:
    """Compute the loss of the task and the total, which adds the routers' losses of a mixture."""
    with record_routing(model) as routing:
        task = F.cross_entropy(model(**inputs).logits, labels)
    if job.kind == "dense":
        return {"task": task, "total": task}
    mask = inputs["attention_mask"]
    balance = job.config.balance_weight * routing.balance_loss(mask)
    return {"task": task, "total": task + balance + job.config.z_weight * routing.z_loss(mask)}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: Any, sentences: Sentences, batch_size: int, title: str
) -> Evaluation:
    """Measure loss, correctness and expert load on sentences, without dropout."""
    training = model.training
    model.eval()
    losses, correct, counts = [], [], []
    starts = range(0, len(sentences), batch_size)
    for start in progress_bar(starts, desc=title, unit="batch", leave=False):
        indices = range(start, min(start + batch_size, len(sentences)))
        inputs, labels = _encode(tokenizer, sentences, list(indices), str(model.device))
        with record_routing(model) as routing:
            logits = model(**inputs).logits
        losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        correct.append((logits.argmax(-1) == labels).cpu())
        if routing.calls:
            counts.append(routing.counts(inputs["attention_mask"]).cpu())
    model.train(training)
    return Evaluation(
        torch.cat(losses).numpy(),
        torch.cat(correct).numpy(),
        torch.stack(counts).sum(0).numpy() if counts else None,
    )


def load_and_predict(folder: Path, texts: tuple[str, ...]) -> np.ndarray:
    """Load a saved model and return its logits for texts."""
    quiet_transformers()
    return predict(hf.from_pretrained(folder), load_tokenizer(folder), texts)


@torch.no_grad()
def predict(model: PreTrainedModel, tokenizer: Any, texts: tuple[str, ...]) -> np.ndarray:
    """Return the logits of texts in evaluation mode."""
    inputs = _tokenize(tokenizer, texts, str(model.device))
    return model.eval()(**inputs).logits.cpu().numpy()


def _tokenize(tokenizer: Any, texts: Any, device: str) -> dict[str, Tensor]:
    """Encode texts as one padded batch on a device."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return dict(encoded.to(device))


def _encode(
    tokenizer: Any, sentences: Sentences, indices: list[int], device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode some sentences and their labels as one batch on a device."""
    labels = torch.tensor([sentences.labels[i] for i in indices], device=device)
    return _tokenize(tokenizer, [sentences.texts[i] for i in indices], device), labels


def _batches(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices without end; every epoch has a new order, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(size, generator=generator).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


def _peak_bytes(device: str) -> int:
    """Return the peak memory so far: of a GPU, or of this process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
