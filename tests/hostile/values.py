"""Unexpected values, and JSON that is corrupted with them."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

Keys = tuple[str | int, ...]

# Placeholders in JSON, replaced in its text by what the module json does not write.
_HUGE, _DEEP, _TWICE = "@huge@", "@deep@", "@twice@"

EXTREMES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 900, 10**6, 2**31, 2**63, 10**18, -(2**63), 10**400, 0.5,
    -0.5, 1e308, float("inf"), float("nan"), "", "x", "novel", "../x", "a\nb", "\u2028", "\x00",
    "(a+)+$", "x" * 10_000, [], {}, [0], [None], [[]], {"": None}, {"x": 1}, [-1, 10**9],
    list(range(2000)), ["x"] * 2000, _HUGE, _DEEP,
)  # fmt: skip


def paths_in(data: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Yield the path to every value in JSON data."""
    if keys:
        yield keys
    for key in _keys(data) if isinstance(data, dict | list) else ():
        yield from paths_in(data[key], (*keys, key))


def corrupted_json(data: Any, rng: Random) -> str:
    """Return the text of JSON data with one or two values dropped, replaced, moved or repeated."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 1, 2))):
        if places := list(paths_in(data)):
            _corrupt(data, rng.choice(places), rng)
    return _text(data)


def _corrupt(data: Any, keys: Keys, rng: Random) -> None:
    *path, last = keys
    for key in path:
        data = data[key]
    value = data[last]
    change = rng.choice(("drop", "extreme", "extreme", "extreme", "other", "wrap", "near", "name"))
    if change == "drop":
        del data[last]
    elif change == "extreme":
        data[last] = rng.choice(EXTREMES)
    elif change == "other":  # a value of the same object or list, whose type often fits
        data[last] = rng.choice([data[key] for key in _keys(data)])
    elif change == "wrap":
        data[last] = rng.choice(([value], {"x": value}, str(value), [value] * 3))
    elif change == "near" and isinstance(value, int | float):
        data[last] = value + rng.choice((-1, 1, value, -2 * value, 0.5))
    elif isinstance(data, dict):
        data[rng.choice(("", "x", "tnmoe", "auto_map", _TWICE, str(last).upper()))] = value


def _keys(data: Any) -> list:
    return list(data) if isinstance(data, dict) else list(range(len(data)))


def _text(data: Any) -> str:
    text = json.dumps(data)
    text = text.replace(f'"{_HUGE}"', "9" * 5000)
    text = text.replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)
    return text.replace(_TWICE, "config")
