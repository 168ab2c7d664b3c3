"""Types of arguments that say what they expect, and the arguments that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.errors import short_repr
from tnmoe.options import ANY_LAYOUTS, GAUGES, SEEDS
from tnmoe.system.parts import Part, check_part

if TYPE_CHECKING:
    from tnmoe.hf import MPOEConfig


# Units of a file's size, in bytes.
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _argument_type(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """Return an argparse type whose error says what it expects."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {short_repr(text)}")
        return value

    return parse


int_from_zero = _argument_type(int, lambda n: n >= 0, "an integer from 0 up")
int_from_one = _argument_type(int, lambda n: n >= 1, "an integer from 1 up")
int_from_two = _argument_type(int, lambda n: n >= 2, "an integer from 2 up")
seed = _argument_type(int, lambda n: 0 <= n < SEEDS, "an integer of 64 bits from 0 up")
positive_number = _argument_type(float, lambda x: 0 < x < inf, "a positive number")
number_from_one = _argument_type(float, lambda x: 1 <= x < inf, "a number from 1 up")
weight = _argument_type(float, lambda x: 0 <= x < inf, "a number from 0 up")
share = _argument_type(float, lambda x: 0 < x <= 1, "a number above 0, up to 1")
fraction = _argument_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def bond_dims(text: str) -> list[int]:
    """Parse integers from 1 up, separated by commas."""
    return [int_from_one(part) for part in text.split(",")]


def group_size(text: str) -> int | list[int]:
    """Parse one integer from 1 up, or several, separated by commas."""
    sizes = bond_dims(text)
    return sizes if len(sizes) > 1 else sizes[0]


def layers(text: str) -> list[int] | str:
    """Parse positions, separated by commas; any other text is a regular expression."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return text


def size(text: str) -> int:
    """Parse a number of bytes, such as ``5GB`` or ``500M``."""
    short = text.upper().removesuffix("B")
    number, unit = short[:-1], short[-1:]
    num_bytes = int(positive_number(number) * _UNITS[unit]) if unit in _UNITS else 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(
            f"expected a size like 5GB or 500MB, got {short_repr(text)}"
        )
    return num_bytes


def part(text: str) -> Part:
    """Parse the number of a part and the number of parts, such as ``2/4``."""
    try:
        return check_part(tuple(map(int, text.split("/"))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a part such as 2/4, the second of four, got {short_repr(text)}"
        ) from error


# Meanings of options that the demo has as well.
LAYOUT = (
    "what experts share: a core in the middle of an MPO (interleaved, split), a core at its end "
    "(hidden), or the matrix as it is, to which each adds a small MPO (residual)"
)
SITES = "sites of an interleaved MPO (default: 5) or of a residual one (default: 2)"

# The arguments that describe an MPOEConfig: name, help, and settings of argparse.
_CONFIG: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "--config",
        "JSON file with entries of an MPOEConfig; the options below override them",
        {"type": Path},
    ),
    ("--experts", "experts per layer (default: 8)", {"type": int_from_one, "dest": "num_experts"}),
    (
        "--top-k",
        "experts per token (default: 1)",
        {"type": int_from_one, "dest": "num_experts_per_tok"},
    ),
    (
        "--layout",
        f"{LAYOUT}; dense makes an ordinary mixture (default: interleaved)",
        {"choices": ANY_LAYOUTS},
    ),
    ("--sites", SITES, {"type": int_from_two}),
    (
        "--group-size",
        "groups of legs that experts own in split and hidden, one site per number, separated by "
        "commas (default: 64)",
        {"type": group_size, "metavar": "N[,N...]"},
    ),
    (
        "--bond-ratio",
        "how many matrices the shared core of split and hidden holds, at exact bonds (default: 1)",
        {"type": number_from_one},
    ),
    (
        "--max-bond",
        "largest bond dimension (default: exact, or 16 in residual)",
        {"type": int_from_one},
    ),
    (
        "--matrices",
        "matrices that become MPOs, separated by commas (default: up,gate,down)",
        {"type": lambda text: text.split(",")},
    ),
    (
        "--layers",
        "networks to convert: positions, separated by commas, or a regular expression "
        "(default: all)",
        {"type": layers},
    ),
    (
        "--every",
        "convert only every N-th of those networks: 2 means the second, the fourth and so on "
        "(default: 1)",
        {"type": int_from_one, "metavar": "N"},
    ),
    ("--gauge", "initial auxiliary cores at exact bonds (default: identity)", {"choices": GAUGES}),
    (
        "--expert-noise",
        "relative noise that makes the experts differ at the start (default: 0)",
        {"type": weight},
    ),
    ("--balance-weight", "weight of the load-balancing loss (default: 0.01)", {"type": weight}),
    ("--z-weight", "weight of the router z-loss (default: 0)", {"type": weight}),
    (
        "--mask-probability",
        "fraction of training steps that leave shared cores unchanged (default: 0)",
        {"type": fraction},
    ),
)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments from which :func:`config_from_options` makes an MPOEConfig."""
    group = parser.add_argument_group("the converted model")
    for name, meaning, settings in _CONFIG:
        group.add_argument(name, help=meaning, default=argparse.SUPPRESS, **settings)


def config_from_options(options: argparse.Namespace) -> MPOEConfig:
    """Build the MPOEConfig that the options of a command describe."""
    from tnmoe.hf import MPOEConfig
    from tnmoe.system.files import read_json

    values = vars(options)
    entries: dict[str, Any] = {}
    if path := values.get("config"):
        entries = read_json(path, pipes=True)
    known = {field.name for field in fields(MPOEConfig)}
    entries |= {name: value for name, value in values.items() if name in known}
    return MPOEConfig.from_dict(entries)
