"""What a mixture's layer costs on many ranks: bytes that ranks send, memory, and arithmetic.

Run: python benchmarks/scaling.py. It computes everything from sizes, on the meta device, and
measures nothing. docs/explanation/scaling.md shows the tables and says what they leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch

from tnmoe import nn
from tnmoe.nn.parallel import expert_placement
from tnmoe.system.tables import format_table

Table = tuple[list[str], list[list[str]]]

# Bytes per second that a GPU sends: NVLink 4 (NVIDIA's data sheet of the H100: 900 GB/s both ways),
# InfiniBand NDR (400 Gb/s) and Ethernet (100 Gb/s), with one port per GPU.
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9, "Ethernet": 12.5e9}
# NVLink joins the 8 GPUs of a machine.
NVLINK_RANKS = 8
# Operations per second: 40 % of the 989 Tflop/s that NVIDIA's data sheet gives for bfloat16.
RATE = 0.4 * 989e12
# Memory of an H100.
MEMORY = 80e9

RANKS = (8, 64, 256, 1024)
TOKENS = (512, 2048, 8192, 32768)


@dataclass(frozen=True)
class Size:
    """The sizes of a model's mixtures, by its published configuration."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int


MIXTRAL = Size("Mixtral-8x7B", 4096, 14336, 8, 2, 32)
QWEN3 = Size("Qwen3-30B-A3B", 2048, 768, 128, 8, 48)
SIZES = (MIXTRAL, QWEN3)

ORDINARY = "ordinary mixture"
SHARING: dict[str, dict[str, object]] = {
    "split": {"layout": "split"},
    "hidden": {"layout": "hidden"},
    "residual 16": {"layout": "residual", "max_bond": 16},
    "residual 64": {"layout": "residual", "max_bond": 64},
}
LAYERS = (ORDINARY, *SHARING)
PLACED = ("replicated", "spread")


@cache
def layer_of(name: str, size: Size, experts: int) -> nn.Experts:
    """Return gated experts in bfloat16, without numbers."""
    make: Callable[..., nn.Experts] = nn.DenseExperts if name == ORDINARY else nn.MPOExperts
    return make(
        experts, size.hidden, size.intermediate, gated=True, activation="silu",
        device="meta", dtype=torch.bfloat16, **SHARING.get(name, {}),
    )  # fmt: skip


def shared_bytes(name: str, size: Size) -> int:
    """Return the bytes of what all experts of a layer share."""
    return sum(
        2 * each.numel() for each in nn.shared_parameters(layer_of(name, size, size.experts))
    )


def owned_bytes(name: str, size: Size, experts: int) -> int:
    """Return the bytes of what the experts of a layer own."""
    every = sum(2 * each.numel() for each in layer_of(name, size, experts).parameters())
    return every - shared_bytes(name, size)


@dataclass(frozen=True)
class Cost:
    """What a layer costs a rank in a training step, shared parts included.

    Attributes
    ----------
    kind : str
        Placement of what experts own. What they share is on every rank.
    group : int
        Ranks over which a placement divides the owned tensors.
    sent, held : float
        Bytes sent; bytes of parameters, gradients and Adam's moments.
    flops : float
    """

    kind: str
    group: int
    sent: float
    held: float
    flops: float

    def seconds(self, bandwidth: float) -> float:
        """Return the time of bytes and arithmetic, of which nothing overlaps."""
        return self.sent / bandwidth + self.flops / RATE


@cache
def costs(
    name: str, size: Size, ranks: int, tokens: int, experts: int, top_k: int
) -> tuple[Cost, ...]:
    """Return the costs of a layer in all placements, and all sizes of a group of ranks.

    The gradient of what experts share is summed over all ranks, in a ring.
    """
    layer, shared = layer_of(name, size, experts), shared_bytes(name, size)
    groups = [group for group in _powers_of_two(ranks) if experts % group == 0]
    found = []
    for group in groups:
        plan = expert_placement(
            layer, group, tokens=tokens, top_k=top_k, replicas=ranks // group, bandwidth=1.0
        )
        for each in plan.placements:
            sent = each.sent_bytes + 2 * (1 - 1 / ranks) * shared
            held = each.held_bytes + 4 * shared
            found.append(Cost(each.kind, group, sent, held, each.flops))
    return tuple(found)


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def cheapest(
    name: str, size: Size, ranks: int, tokens: int, *, link: str | None = None,
    experts: int | None = None, top_k: int | None = None,
) -> Cost:  # fmt: skip
    """Return the placement of least time, or of least bytes without a link, that fits a GPU."""
    every = costs(name, size, ranks, tokens, experts or size.experts, top_k or size.top_k)
    fitting = [each for each in every if each.held <= MEMORY / size.layers] or every
    return min(fitting, key=lambda each: each.seconds(LINKS[link]) if link else each.sent)


def held(name: str, size: Size, ranks: int, kind: str) -> float:
    """Return the bytes that a rank holds in training; ``spread`` is as wide as experts allow."""
    group = 1 if kind == "replicated" else min(ranks, size.experts)
    every = costs(name, size, ranks, 1, size.experts, size.top_k)
    return next(each.held for each in every if (each.kind, each.group) == (kind, group))


def speedup(name: str, size: Size, ranks: int, tokens: int, link: str) -> float:
    """Return the time of a step of an ordinary mixture over that of a layer that shares."""
    ordinary, own = (
        cheapest(each, size, ranks, tokens, link=link).seconds(LINKS[link])
        for each in (ORDINARY, name)
    )
    return ordinary / own


def break_even(name: str, size: Size, ranks: int) -> float:
    """Return the tokens per rank and step from which a layer that shares sends less."""
    few, many = 1.0, 2.0**17
    while many / few > 1.001:
        middle = sqrt(few * many)
        ordinary, own = (cheapest(each, size, ranks, round(middle)) for each in (ORDINARY, name))
        few, many = (few, middle) if own.sent < ordinary.sent else (middle, many)
    return many


def parts_table(size: Size) -> Table:
    """Return the megabytes that the experts of a layer share and own."""
    return (
        ["layer", "shared", "owned"],
        [
            [
                name,
                _mega(shared_bytes(name, size)),
                _mega(owned_bytes(name, size, size.experts)),
            ]
            for name in LAYERS
        ],
    )


def memory_table(size: Size) -> Table:
    """Return the megabytes that a rank holds in training, by the number of ranks."""
    kinds = [(ORDINARY, "spread"), *((name, kind) for name in SHARING for kind in PLACED)]
    return (
        ["layer, what experts own", *(f"{ranks:,} ranks" for ranks in RANKS)],
        [
            [f"{name}, {kind}", *(_mega(held(name, size, ranks, kind)) for ranks in RANKS)]
            for name, kind in kinds
        ],
    )


def sent_table(size: Size, ranks: int) -> Table:
    """Return the megabytes that a rank sends in a step, in the placement of least bytes."""
    return (
        ["layer", *(f"{tokens:,} tokens" for tokens in TOKENS)],
        [
            [name, *(_mega(cheapest(name, size, ranks, tokens).sent) for tokens in TOKENS)]
            for name in LAYERS
        ],
    )


def break_even_table(size: Size) -> Table:
    """Return the tokens per rank and step from which layers send less, by ranks."""
    return (
        ["layer", *(f"{ranks:,} ranks" for ranks in RANKS)],
        [
            [name, *(_two_digits(break_even(name, size, ranks)) for ranks in RANKS)]
            for name in SHARING
        ],
    )


def arithmetic_table(size: Size) -> Table:
    """Return the operations of a token on one rank, in multiples of an expert of the size."""
    unit = 3 * 3 * 2 * size.hidden * size.intermediate
    top_ks = (1, 2, 4, 8)

    def relative(name: str, top_k: int) -> float:
        every = costs(name, size, 1, 8192, size.experts, top_k)
        return min(each.flops for each in every) / 8192 / unit

    return (
        ["layer", *(f"top-{top_k}" for top_k in top_ks)],
        [[name, *(f"{relative(name, top_k):.2f}" for top_k in top_ks)] for name in LAYERS],
    )


def experts_table(name: str, size: Size, ranks: int, tokens: int) -> Table:
    """Return the bytes of an ordinary mixture over those of a layer that shares."""

    def relative(experts: int, top_k: int) -> float:
        ordinary, own = (
            cheapest(each, size, ranks, tokens, experts=experts, top_k=top_k).sent
            for each in (ORDINARY, name)
        )
        return ordinary / own

    top_ks = (1, 2, 4, 8)
    return (
        ["experts", *(f"top-{top_k}" for top_k in top_ks)],
        [
            [f"{experts}", *(_ratio(relative(experts, top_k)) for top_k in top_ks)]
            for experts in (8, 32, 128, 512)
        ],
    )


def settings() -> list[tuple[int, str]]:
    """Return numbers of ranks with the links that can join them."""
    return [
        (ranks, link)
        for ranks in RANKS
        for link in LINKS
        if link != "NVLink" or ranks <= NVLINK_RANKS
    ]


def winners_table(name: str, size: Size) -> Table:
    """Return by what factor a layer that shares is faster, by ranks, link and tokens per rank."""
    return (
        ["ranks, link", *(f"{tokens:,} tokens" for tokens in TOKENS)],
        [
            [
                f"{ranks:,}, {link}",
                *(_ratio(speedup(name, size, ranks, tokens, link)) for tokens in TOKENS),
            ]
            for ranks, link in settings()
        ],
    )


def _mega(size: float) -> str:
    mega = size / 1e6
    return f"{mega:.2f}" if mega < 1 else f"{mega:.1f}" if mega < 10 else f"{mega:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def markdown(table: Table) -> str:
    """Lay out a table for a page."""
    headers, rows = table
    return "\n".join(map(_line, [headers, ["---", *("---:" for _ in headers[1:])], *rows]))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print all tables."""
    for size in SIZES:
        named: Sequence[tuple[str, Table]] = [
            ("MB that experts share and own", parts_table(size)),
            ("MB per rank in training", memory_table(size)),
            *(
                (f"MB sent per rank and step on {ranks:,} ranks, by tokens per rank",
                 sent_table(size, ranks))
                for ranks in RANKS
            ),
            ("tokens per rank from which sharing sends less", break_even_table(size)),
            ("operations per token, of one expert", arithmetic_table(size)),
            ("bytes of an ordinary mixture / residual 16, 64 ranks, 8,192 tokens",
             experts_table("residual 16", size, 64, 8192)),
            *(
                (f"time of an ordinary mixture / {name}", winners_table(name, size))
                for name in SHARING
            ),
        ]  # fmt: skip
        for title, table in named:
            print(f"{size.name}: {title}\n\n{format_table(*table)}\n")


if __name__ == "__main__":
    main()
