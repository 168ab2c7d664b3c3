"""Arguments that say what they expected, and those that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.errors import shown
from tnmoe.options import ANY_LAYOUTS, GAUGES, SEEDS

if TYPE_CHECKING:
    from tnmoe.hf import MPOEConfig


def _checked(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """An argparse type that says what it expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {shown(text)}")
        return value

    return parse


from_zero = _checked(int, lambda n: n >= 0, "an integer from 0 up")
from_one = _checked(int, lambda n: n >= 1, "an integer from 1 up")
from_two = _checked(int, lambda n: n >= 2, "an integer from 2 up")
seed = _checked(int, lambda n: 0 <= n < SEEDS, "an integer of 64 bits from 0 up")
positive = _checked(float, lambda x: 0 < x < inf, "a positive number")
weight = _checked(float, lambda x: 0 <= x < inf, "a number from 0 up")
share = _checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def numbers(text: str) -> list[int]:
    """Integers from 1 up between commas."""
    return [from_one(part) for part in text.split(",")]


def layers(text: str) -> list[int] | str:
    """Positions between commas, or a regular expression."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return text


def size(text: str) -> int:
    """Bytes, as ``5GB`` or ``500MB``."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    num_bytes = int(positive(number) * units[unit]) if unit in units else 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MB, got {shown(text)}")
    return num_bytes


def add_config(parser: argparse.ArgumentParser) -> None:
    """Arguments that :func:`config_of` makes an MPOEConfig of."""
    group = parser.add_argument_group("what it becomes")

    def add(name: str, meaning: str, **details: Any) -> None:
        group.add_argument(name, help=meaning, default=argparse.SUPPRESS, **details)

    add("--config", "JSON file with entries of an MPOEConfig; what follows wins", type=Path)
    add("--experts", "experts per layer (default: 8)", type=from_one, dest="num_experts")
    add("--top-k", "experts per token (default: 1)", type=from_one, dest="num_experts_per_tok")
    add(
        "--layout",
        "how matrices split over sites; dense: an ordinary mixture (default: interleaved)",
        choices=ANY_LAYOUTS,
    )
    add("--sites", "sites of an interleaved MPO (default: 5)", type=from_two)
    add("--max-bond", "largest bond dimension (default: exact)", type=from_one)
    add(
        "--matrices",
        "which become MPOs, between commas (default: up,gate,down)",
        type=lambda text: text.split(","),
    )
    add(
        "--layers",
        "networks to convert: positions between commas, or a regular expression (default: all)",
        type=layers,
    )
    add("--every", "of those, the last of each so many (default: 1)", type=from_one)
    add(
        "--gauge",
        "how auxiliary cores of exact bonds start (default: identity)",
        choices=GAUGES,
    )
    add("--expert-noise", "relative noise that sets experts apart (default: 0)", type=weight)
    add("--balance-weight", "weight of the load-balancing loss (default: 0.01)", type=weight)
    add("--z-weight", "weight of the router z-loss (default: 0)", type=weight)
    add("--mask-probability", "share of steps that spare shared tensors", type=share)


def config_of(options: argparse.Namespace) -> MPOEConfig:
    """The MPOEConfig that the command line asks for."""
    from tnmoe.hf import MPOEConfig
    from tnmoe.system.files import read_json

    given = vars(options)
    entries: dict[str, Any] = {}
    if path := given.get("config"):
        entries = read_json(path, pipes=True)
    known = {field.name for field in fields(MPOEConfig)}
    entries |= {name: value for name, value in given.items() if name in known}
    return MPOEConfig.from_dict(entries)
