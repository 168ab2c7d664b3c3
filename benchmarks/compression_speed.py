"""Times of compressed experts beside those of the mixture that they come from, and of making them.

The layers meet the same tokens in one process, in turns. The decompositions read the same random
experts, which have an ancestor in common, and hold as many numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tensorly
import torch
from library import TnmoeTorch
from machine import (
    environment,
    hardware_slug,
    keep_freed_memory,
    set_threads,
    take_turns,
    timed,
)
from tensorly.decomposition import partial_tucker
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tnmoe.hf.ordinary import StackedFormat
from tnmoe.joint.basis import column_basis, row_basis
from tnmoe.joint.low_rank import low_rank
from tnmoe.nn import LowRankProjection, MPOExperts
from tnmoe.system.tables import format_table

TOKENS, KEEPS = (1, 16, 64, 1024), (0.7, 0.5)
# How transformers may compute its own experts.
IMPLEMENTATIONS = ("eager", "grouped_mm")


def main() -> None:
    """Measure layers and decompositions; print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--stack", type=int, default=64, help="experts of the decompositions")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    keep_freed_memory()
    threads = set_threads()
    report = {
        "environment": environment(("torch", "transformers", "tensorly"), "cpu", threads),
        "layers": layer_rows(768, 3072, options.experts, options.top_k, options.turns),
        "decompositions": decomposition_rows(768, 3072, options.stack),
    }
    for name in ("layers", "decompositions"):
        rows: list[dict[str, Any]] = report[name]
        print(format_table(list(rows[0]), [list(row.values()) for row in rows]), end="\n\n")
    folder = Path(__file__).parent / "results" / "compression"
    output = options.output or folder / f"speed-{hardware_slug('cpu')}.json"
    output.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def layer_rows(
    hidden: int, inner: int, experts: int, top_k: int, turns: int
) -> list[dict[str, Any]]:
    """Time layers on several numbers of tokens, as ratios over transformers' fastest way."""
    torch.manual_seed(0)
    layers = ordinary_layers(hidden, inner, experts)
    matrices = StackedFormat().matrices(layers[IMPLEMENTATIONS[0]])
    for keep in KEEPS:
        layers |= compressed_layers(matrices, keep)
    library, rows = TnmoeTorch("cpu"), []
    for tokens in TOKENS:
        states, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        calls = {
            name: (partial(layer, states, index, weights), 1e-3 * tokens**0.5)
            for name, layer in layers.items()
        }
        times = take_turns(calls, library, turns)
        medians = {name: median(seconds) for name, seconds in times.items()}
        ordinary = min(medians[name] for name in IMPLEMENTATIONS)
        rows += [
            {
                "tokens": tokens,
                "layer": name,
                "parameters": sum(each.numel() for each in layers[name].parameters()),
                "ms": round(1e3 * seconds, 2),
                "over ordinary": round(seconds / ordinary, 2),
            }
            for name, seconds in medians.items()
        ]
    return rows


def ordinary_layers(hidden: int, inner: int, experts: int) -> dict[str, Any]:
    """Make transformers' experts, one layer per implementation, with the same numbers."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    first = MixtralExperts(config).eval()
    for parameter in first.parameters():
        parameter.normal_(std=0.02)
    layers = {}
    for name in IMPLEMENTATIONS:
        layers[name] = copy.deepcopy(first)
        layers[name].config = copy.deepcopy(config)
        layers[name].config._experts_implementation = name
    return layers


def compressed_layers(matrices: dict[Any, Tensor], keep: float) -> dict[str, Any]:
    """Make the experts of two layouts that hold at most this share of the numbers."""
    stacks = {
        "gate_up": torch.cat([matrices["gate"], matrices["up"]], dim=1),
        "down": matrices["down"],
    }
    bases: dict[str, Any] = {"gate_up": row_basis, "down": column_basis}
    shared = {
        name: bases[name](stack).decompose(stack, basis_size(stack.numel(), keep, *stack.shape))
        for name, stack in stacks.items()
    }
    own = {name: own_ranks(stack, keep) for name, stack in stacks.items()}
    return {
        f"hidden, {keep:.0%}": MPOExperts.from_shared(**shared, activation="silu").eval(),
        f"low_rank, {keep:.0%}": MPOExperts.from_shared(**own, activation="silu").eval(),
    }


def basis_size(numbers: int, keep: float, experts: int, rows: int, columns: int) -> int:
    """Return the size of a basis of the smaller side: a multiple of 8."""
    owned, shared = max(rows, columns), min(rows, columns)
    return int(keep * numbers / (experts * owned + shared)) // 8 * 8


def own_ranks(stack: Tensor, keep: float) -> LowRankProjection:
    """Give every expert a rank of its own; they differ by up to a fifth."""
    count, rows, columns = stack.shape
    share, sides = keep * rows * columns, rows + columns
    # r (out + in − r) is the share.
    rank = (sides - (sides**2 - 4 * share) ** 0.5) / 2
    ranks = [int(rank * factor) // 8 * 8 for factor in torch.linspace(0.9, 1.1, count).tolist()]
    return LowRankProjection.from_factors(low_rank(stack).decompose(stack, ranks))


def decomposition_rows(columns: int, rows: int, experts: int) -> list[dict[str, Any]]:
    """Time decompositions of experts with an ancestor, at half of their numbers."""
    generator = torch.Generator().manual_seed(0)
    ancestor = torch.randn(rows, columns, generator=generator)
    matrices = ancestor + 0.3 * torch.randn(experts, rows, columns, generator=generator)
    size = columns // 2
    rank = rows * columns // (2 * (rows + columns))
    calls: dict[str, Callable[[], Tensor]] = {
        "common basis, one call": lambda: (
            row_basis(matrices).decompose(matrices, size).to_matrices()
        ),
        "separate SVDs": lambda: torch.stack([truncated(each, rank) for each in matrices]),
        "tensorly, Tucker of the stack": lambda: tucker(matrices, size),
    }
    found = []
    for name, call in calls.items():
        seconds, result = timed(call, TnmoeTorch("cpu"))
        error = float((result - matrices).norm() / matrices.norm())
        found.append({"decomposition": name, "s": round(seconds, 2), "error": round(error, 4)})
    fastest = found[0]["s"]
    return [row | {"over one call": round(row["s"] / fastest, 2)} for row in found]


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Return the truncated SVD of a matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def tucker(matrices: Tensor, size: int) -> Tensor:
    """Return tensorly's Tucker decomposition of a stack, with a common basis of rows."""
    tensorly.set_backend("pytorch")
    (core, factors), _ = partial_tucker(matrices, rank=[size], modes=[2])
    return tensorly.tenalg.multi_mode_dot(core, factors, modes=[2])


if __name__ == "__main__":
    main()
