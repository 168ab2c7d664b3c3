"""Layers of experts in bfloat16 on a GPU, part of gpu.py: dense, ordinary, split, hidden, residual.

Three modes per case. ``infer`` and ``train`` are calls one after the other, so at few tokens the
CPU that launches kernels sets the time. ``graph`` replays a captured forward pass after another
array has replaced the layer's weights in the GPU's cache: a layer of a deep model, without the CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any

import torch
from expert_layers import DTYPES, build_on, inputs_on, makers
from experts import make_call, sizes
from gpu import first_line
from gpu_checks import capture
from torch import Tensor, nn

from tnmoe.system.tables import format_table

LAYERS = ["dense FFN", "grouped_mm", "tnmoe split 64", "tnmoe hidden 64", "tnmoe residual 16"]
# Network, whether it is gated, and number of experts: the most important first.
SIZES = (
    ("768x3072", False, 8),
    ("4096x14336", True, 8),
    ("768x3072", False, 64),
    ("4096x14336", True, 64),
)
TOP_K = (2, 8, 4, 1)
TOKENS = (1, 16, 64, 512, 4096)
MODES = ("infer", "graph", "train")
# A capture serves decoding.
MOST_TOKENS_OF_GRAPH = 64
TURNS = 5
TURN_S = 5e-3
# Bytes that replace everything in the cache of a GPU.
CACHE = 2**28


def rows(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the medians of all layers for every case."""
    all_sizes = (("64x128", True, 8),) if tiny else SIZES
    for ffn, gated, experts in all_sizes:
        case: dict[str, Any] = {"ffn": ffn, "gated": gated, "experts": experts}
        layers = build(case, device)
        for top_k, tokens in product(TOP_K[:2], (1, 16)) if tiny else product(TOP_K, TOKENS):
            case |= {"top_k": top_k, "tokens": tokens}
            yield case | {"layers": measure(layers, case, device)}
        layers.clear()
        gc.collect()


def build(case: dict[str, Any], device: str) -> dict[str, nn.Module | str]:
    """Build all layers of a size; the text of an error stands for a layer that cannot be built."""
    layers: dict[str, nn.Module | str] = {}
    # 64 ordinary experts in float32 do not fit into a GPU's memory.
    torch.set_default_dtype(getattr(torch, DTYPES[device]))
    for name, make in makers(case, LAYERS).items():
        try:
            layers[name] = build_on(device, make)
        except Exception as error:
            layers[name] = first_line(error)
    torch.set_default_dtype(torch.float32)
    return layers


def measure(
    layers: dict[str, nn.Module | str], case: dict[str, Any], device: str
) -> dict[str, dict[str, Any]]:
    """Time all layers in all modes; the layers take turns."""
    inputs = inputs_on(device, case)
    result: dict[str, dict[str, Any]] = {
        name: {"note": layer} if isinstance(layer, str) else sizes(layer, case, inputs[1])
        for name, layer in layers.items()
    }
    for mode in MODES:
        if mode == "graph" and (case["tokens"] > MOST_TOKENS_OF_GRAPH or device == "cpu"):
            continue
        calls = {}
        for name, layer in layers.items():
            if not isinstance(layer, str):
                try:
                    calls[name] = prepare(layer, inputs, mode)
                    calls[name]()
                except Exception as error:
                    calls.pop(name, None)
                    result[name][mode] = {"note": first_line(error)}
        for name, seconds in take_turns(calls, device, cold=mode == "graph").items():
            result[name][mode] = {"median s": median(seconds), "seconds": seconds}
        calls.clear()
    return result


def prepare(layer: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> Callable[[], Any]:
    """Return the call to time."""
    if mode != "graph":
        return make_call(layer, inputs, mode)
    with torch.no_grad():
        return capture(lambda states: layer(states, *inputs[1:]), inputs[0])


def take_turns(
    calls: dict[str, Callable[[], Any]], device: str, cold: bool
) -> dict[str, list[float]]:
    """Return the seconds of a call in every turn, by call."""
    other = torch.empty(CACHE if cold else 0, dtype=torch.uint8, device=device)
    repeats = {}
    for name, call in calls.items():
        expected = seconds_of([call] * 2, device) / 2
        repeats[name] = max(1, min(20, round(TURN_S / expected)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            if cold:
                singles = [seconds_of([call], device, other.zero_) for _ in range(repeats[name])]
                seconds[name].append(median(singles))
            else:
                seconds[name].append(seconds_of([call] * repeats[name], device) / repeats[name])
    return seconds


def seconds_of(
    calls: list[Callable[[], Any]], device: str, before: Callable[[], Any] | None = None
) -> float:
    """Return the seconds of several calls together, by the GPU's own clock."""
    if before is not None:
        before()
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(rows: list[dict[str, Any]]) -> str:
    """Write a table per mode: the dense network's time, and the layers' as multiples of it."""
    return "\n\n".join(filter(None, (table(rows, mode) for mode in MODES)))


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Write the table of a mode, or nothing without a case."""
    lines = []
    for row in rows:
        dense, *others = (row["layers"][name].get(mode, {}).get("median s") for name in LAYERS)
        if dense:
            lines.append([
                row["ffn"] + ", gated" * row["gated"], row["experts"], row["top_k"], row["tokens"],
                f"{1e3 * dense:.3f}", *(f"{each / dense:.2f}" if each else "-" for each in others),
            ])  # fmt: skip
    names = (name.removeprefix("tnmoe ") for name in LAYERS[1:])
    heads = ["FFN", "experts", "top_k", "tokens", "dense ms", *(f"{name} ×" for name in names)]
    return f"{mode}\n{format_table(heads, lines)}" if lines else ""
