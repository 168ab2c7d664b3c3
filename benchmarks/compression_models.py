"""Mixtures that the benchmark of compression trains: Mixtral from scratch on several domains.

Every domain is one text. A small byte-level vocabulary is learned from all of them. A training step
draws windows from all domains alike, and the end of every domain is held out.
"""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from experiments.texts import encode, train_tokenizer
from tnmoe.system.durable import sync

# Characters that one domain gives, and that the vocabulary is learned from.
_MOST, _SAMPLE = 5_000_000, 1_000_000
# Share of a domain that is held out, at its end.
_HELD_OUT = 0.05
_WARMUP, _CLIP, _DECAY = 0.05, 1.0, 0.1
# Seconds between checkpoints; writing them takes a tenth of the time at most.
_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE = 60.0, 0.1


@dataclass(frozen=True)
class Budget:
    """What measuring one model may cost.

    Attributes
    ----------
    calibration, held_out : int
        Windows of every domain that calibrate, and that measure the loss.
    batch : int
        Windows that calibrate at once.
    probe_every : int
        The probe takes one of this number of held-out windows.
    removed : int, optional
        Experts that the probe removes, one at a time; by default all.
    healing : int
        Steps of healing.
    rates : tuple of float
        Peaks of the learning rate of healing. The better result counts: methods that lost much need
        a high rate, and others lose by one.
    """

    calibration: int = 32
    held_out: int = 32
    batch: int = 8
    probe_every: int = 2
    removed: int | None = None
    healing: int = 100
    rates: tuple[float, ...] = (1e-3, 2e-4)


@dataclass(frozen=True)
class Size:
    """Sizes of a mixture, and of its training.

    Attributes
    ----------
    hidden, intermediate, experts, top_k, layers, heads : int
    steps, windows, window : int
        Steps of training, windows in a batch, and tokens in a window.
    rate : float
        Peak of the learning rate.
    balance : float
        Factor of the balance loss of each layer.
    vocabulary : int
    budget : Budget
        No field, since it changes no model.
    """

    budget: ClassVar[Budget] = Budget()
    hidden: int = 128
    intermediate: int = 256
    experts: int = 8
    top_k: int = 2
    layers: int = 4
    heads: int = 4
    steps: int = 1500
    windows: int = 16
    window: int = 128
    rate: float = 3e-3
    balance: float = 0.02
    vocabulary: int = 2048

    def model(self, seed: int) -> MixtralForCausalLM:
        """Build a random model."""
        config = MixtralConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden,
            intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads,
            num_local_experts=self.experts, num_experts_per_tok=self.top_k,
            max_position_embeddings=self.window, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=True, router_aux_loss_coef=0.0,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )  # fmt: skip
        config._experts_implementation = "eager"
        torch.manual_seed(seed)
        return MixtralForCausalLM(config)

    def encoder(self, texts: Sequence[str]) -> Callable[[str], np.ndarray]:
        """Return a function that encodes texts, by a vocabulary learned from all of them."""
        sample = "".join(text[:_SAMPLE] for text in texts)
        return partial(encode, train_tokenizer(sample, self.vocabulary))


SIZES = {
    "small": Size(),
    "medium": Size(hidden=192, intermediate=384, experts=16, heads=6, steps=2000),
    "tiny": Size(
        hidden=16, intermediate=24, experts=4, layers=2, heads=2, steps=6, windows=2, window=32,
        vocabulary=300,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Tokens of all domains.

    Attributes
    ----------
    train, held_out : dict of str to Tensor
        Tokens by the name of their domain.
    bytes_per_token : float
        Of the held-out parts.
    """

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    bytes_per_token: float

    def batch(self, size: Size, seed: int, step: int) -> Tensor:
        """Return the windows of a step, the same number from every domain or one more or less."""
        draw = np.random.default_rng((seed, step))
        names = list(self.train)
        rows = []
        for number in range(size.windows):
            tokens = self.train[names[(number + step) % len(names)]]
            start = int(draw.integers(0, len(tokens) - size.window))
            rows.append(tokens[start : start + size.window])
        return torch.stack(rows).long()

    def windows(self, size: Size, per_domain: int, *, held_out: bool = True) -> Tensor:
        """Return windows, spread evenly over every domain: held-out ones, or those of training."""
        rows = []
        for tokens in (self.held_out if held_out else self.train).values():
            starts = np.linspace(0, len(tokens) - size.window, per_domain).astype(int)
            rows += [tokens[start : start + size.window] for start in starts]
        return torch.stack(rows).long()


def prepare(folder: Path, texts: Sequence[Path], size: Size) -> Data:
    """Encode texts and the source of Python's library, once for a folder and a vocabulary."""
    file = folder / f"tokens-{size.vocabulary}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        domains = {path.stem: path.read_text(encoding="utf-8-sig")[:_MOST] for path in texts}
        domains["python"] = python_source()
        encoded = size.encoder(list(domains.values()))
        length, count = 0, 0
        arrays: dict[str, Any] = {}
        for name, text in domains.items():
            cut = round((1 - _HELD_OUT) * len(text))
            arrays[f"train {name}"] = encoded(text[:cut]).astype(np.uint16)
            arrays[f"held out {name}"] = held = encoded(text[cut:]).astype(np.uint16)
            length, count = length + len(text[cut:].encode()), count + len(held)
        np.savez(file, sizes=np.array([length, count]), **arrays)
    with np.load(file) as stored:
        parts: dict[str, dict[str, Tensor]] = {"train ": {}, "held out ": {}}
        for kind, part in parts.items():
            for name in stored.files:
                if name.startswith(kind):
                    part[name.removeprefix(kind)] = torch.from_numpy(stored[name].astype(np.int32))
        length, count = stored["sizes"]
    return Data(parts["train "], parts["held out "], float(length / count))


def python_source() -> str:
    """Return source files of Python's library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts, length = [], 0
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        length += len(parts[-1])
        if length > _MOST:
            break
    return "".join(parts)[:_MOST]


def trained(size: Size, name: str, seed: int, data: Data, folder: Path) -> MixtralForCausalLM:
    """Return the model of a seed: from its file, or by training that goes on where it stopped."""
    file = folder / f"{name}-seed{seed}.pt"
    model = size.model(seed)
    if not file.exists():
        train(model, size, seed, data, file)
    state = torch.load(file, weights_only=True, mmap=True)
    if state["size"] != asdict(size):
        raise SystemExit(f"{file} holds a model of other settings: delete it, or name it otherwise")
    model.load_state_dict(state["model"])
    return model.eval()


def train(model: MixtralForCausalLM, size: Size, seed: int, data: Data, file: Path) -> None:
    """Train a model, with a checkpoint every minute if they are small, and save it."""
    optimizer = adamw(model.named_parameters(), size.rate)
    unfinished = file.with_suffix(".unfinished")
    first = 0
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True, mmap=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    saved, pause = time.monotonic(), _CHECKPOINT_SECONDS
    for step in range(first, size.steps):
        set_rate(optimizer, size.rate, step, size.steps)
        loss = make_step(model, optimizer, data.batch(size, seed, step), size.balance)
        if step % max(1, size.steps // 30) == 0:
            print(f"{file.stem} step {step} loss {loss:.4f}", flush=True)
        if (start := time.monotonic()) - saved > pause:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save({**parts, "step": step + 1}, unfinished)
            saved = time.monotonic()
            pause = max(_CHECKPOINT_SECONDS, (saved - start) / _CHECKPOINT_SHARE)
    save({"model": model.state_dict(), "size": asdict(size)}, file)
    unfinished.unlink(missing_ok=True)


def adamw(parameters: Iterator[tuple[str, nn.Parameter]], rate: float) -> torch.optim.Optimizer:
    """Return AdamW, which decays matrices only."""
    named = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": _DECAY},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused steps take a tenth of the time, which counts for hundreds of millions of parameters.
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95), fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Let the rate rise, and then fall linearly to a tenth."""
    warmup = max(1, round(_WARMUP * steps))
    share = min((step + 1) / warmup, 1 - 0.9 * (step - warmup) / max(1, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = peak * share


def make_step(
    model: MixtralForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, balance: float = 0.0
) -> float:
    """Make one step with clipped gradients; return the loss before it, without the balance loss."""
    result = model(input_ids=ids, labels=ids, output_router_logits=balance > 0)
    loss = result.loss
    optimizer.zero_grad()
    if balance:
        top_k = model.config.num_experts_per_tok
        total = loss + balance * sum(balance_loss(each, top_k) for each in result.router_logits)
        total.backward()
    else:
        loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], _CLIP)
    optimizer.step()
    return float(loss.detach())


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Return the balance loss of one layer (Fedus et al., arXiv:2101.03961); 1 if balanced.

    transformers has one loss for all layers together, under which single layers lost experts.
    """
    scores = logits.float().softmax(-1)
    chosen = scores.topk(top_k, dim=-1).indices
    load = nn.functional.one_hot(chosen, logits.shape[-1]).float().mean((0, 1))
    return logits.shape[-1] * (load * scores.mean(0)).sum()


def save(state: dict[str, Any], file: Path) -> None:
    """Write a file under another name first, so that no partial one has its name."""
    partial = file.with_name(file.name + ".partial")
    torch.save(state, partial)
    sync(partial)
    os.replace(partial, file)
