"""A short training comparison, part of gpu.py: one small decoder, continued in several forms.

The decoder reads bytes of the help topics that come with Python. It is trained on their first part
as a dense model. Then every method continues on the rest, with the same batches and steps. One
seed and one learning rate: the losses say that training works, and only hint at what is better.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from gpu import first_line
from torch import Tensor, nn

from tnmoe.nn import MPOMoE, record_routing
from tnmoe.system.tables import format_table

# Settings of the mixtures; None is the dense model.
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "ordinary": {"layout": "dense"},
    "residual 16": {"layout": "residual", "max_bond": 16},
    "hidden 64": {"layout": "hidden"},
    "split 64": {"layout": "split"},
    "residual 16, top_k 8": {"layout": "residual", "max_bond": 16, "top_k": 8},
}
EXPERTS, TOP_K = 8, 2
BYTES = 256
LEARNING_RATE = 2e-3
BALANCE = 0.01
# Where the dense model's text ends, and where the text begins that no model trains on.
OLD, HELD_OUT = 0.7, 0.95


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of the training."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    window: int = 256
    windows: int = 16
    steps_before: int = 400
    steps: int = 200


TINY = Size(width=64, layers=1, heads=2, window=32, windows=4, steps_before=8, steps=8)


class FeedForward(nn.Module):
    """The dense feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(states)))


class Block(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.into, self.out_of = (
            nn.Linear(size.width, times * size.width, bias=False) for times in (3, 1)
        )
        self.ffn: nn.Module = FeedForward(size.width)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.into(self.norms[0](states)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.out_of(mixed.transpose(1, 2).flatten(2))
        return states + self.ffn(self.norms[1](states))


class Decoder(nn.Module):
    """A decoder of bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, size.width)
        self.positions = nn.Parameter(0.02 * torch.randn(size.window, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, BYTES))

    def forward(self, windows: Tensor) -> Tensor:
        """Return the mean loss of windows (B, S + 1)."""
        states = self.tokens(windows[:, :-1]) + self.positions
        logits = self.head(self.blocks(states))
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def rows(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the result of every method."""
    size = TINY if tiny else Size()
    text = torch.tensor(list("".join(topics.topics.values()).encode()), dtype=torch.uint8)
    old, new, held_out = text.tensor_split([round(share * len(text)) for share in (OLD, HELD_OUT)])
    torch.manual_seed(0)
    model = Decoder(size).to(device)
    train(model, old, size, size.steps_before)
    before = evaluate(model, held_out, size)
    for name, settings in METHODS.items():
        row: dict[str, Any] = {"method": name, "loss before": before}
        try:
            found = continued(copy.deepcopy(model), settings, (new, held_out), size)
            yield row | {"status": "passed", **found}
        except Exception as error:
            yield row | {"status": "failed", "message": first_line(error)}


def continued(
    model: Decoder, settings: dict[str, Any] | None, texts: tuple[Tensor, Tensor], size: Size
) -> dict[str, Any]:
    """Turn the dense model into a method's, train it on the first text, and return its results."""
    torch.manual_seed(1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if settings is not None:
        for block in model.blocks:
            block.ffn = mixture(block.ffn, {"top_k": TOP_K, **settings})
    seconds = train(model, texts[0], size, size.steps)
    return {
        "peak bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "s per step": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": evaluate(model, texts[1], size),
    }


def mixture(ffn: FeedForward, settings: dict[str, Any]) -> MPOMoE:
    """Make a mixture that starts as a dense network."""
    return MPOMoE.from_dense(
        ffn.up.weight,
        ffn.down.weight,
        num_experts=EXPERTS,
        activation="gelu",
        up_bias=ffn.up.bias,
        down_bias=ffn.down.bias,
        **settings,
    )


def train(model: Decoder, text: Tensor, size: Size, steps: int) -> float:
    """Train, and return the seconds of a step in the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    draws = torch.Generator().manual_seed(steps)
    is_mixture = any(isinstance(module, MPOMoE) for module in model.modules())
    begin = 0.0
    for step in range(steps):
        if step == steps // 2:
            begin = now(model)
        windows = draw(text, size, draws).to(model.positions.device)
        with record_routing(model) if is_mixture else nullcontext() as routing:
            loss = half_precision(model, windows)
        if routing is not None:
            loss = loss + BALANCE * routing.balance_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (now(model) - begin) / (steps - steps // 2)


def draw(text: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """Draw windows (B, S + 1) of a text."""
    starts = torch.randint(len(text) - size.window, (size.windows, 1), generator=generator)
    return text[starts + torch.arange(size.window + 1)].long()


@torch.no_grad()
def evaluate(model: Decoder, text: Tensor, size: Size) -> float:
    """Return the mean loss over a text, window by window."""
    length = size.window + 1
    windows = text[: len(text) // length * length].view(-1, length).long()
    batches = windows.to(model.positions.device).split(size.windows)[:64]
    # The last batch may be smaller.
    losses = [half_precision(model, batch).item() * len(batch) for batch in batches]
    return sum(losses) / sum(map(len, batches))


def half_precision(model: Decoder, windows: Tensor) -> Tensor:
    """Return the loss under autocast."""
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        return model(windows)


def now(model: Decoder) -> float:
    """Return the time when the device has finished its work."""
    if model.positions.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(rows: list[dict[str, Any]]) -> str:
    """Write a table of losses, and of costs relative to the dense model."""
    dense, lines, failures = rows[0], [], []
    for row in rows:
        if row["status"] == "failed":
            failures.append(f"failed: {row['method']}: {row['message']}")
            continue
        costs = (
            f"{row[key] / dense[key]:.2f}" if dense.get(key) else "-"
            for key in ("s per step", "parameters", "peak bytes")
        )
        lines.append([row["method"], f"{row['loss']:.4f}", *costs])
    heads = ["method", "held-out loss", "step ×", "parameters ×", "memory ×"]
    before = f"held-out loss of the dense model before: {dense['loss before']:.4f} nats per byte"
    return "\n".join([before, format_table(heads, lines), *failures])
