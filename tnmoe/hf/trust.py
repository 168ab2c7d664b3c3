"""What a folder cannot bring about: that code runs which neither tnmoe nor transformers has.

Such code comes from modules in the folder, or of the Hub, which ``auto_map`` names, and from
kernels of the Hub, which implementations of attention and of experts name. transformers asks on
standard input, or downloads, where nobody said anything; here it is as if they were not named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_CODE = "auto_map"

# What transformers and tnmoe have themselves, by the entries that choose among it.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm", "tnmoe")
_IMPLEMENTATIONS = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
}

_without: ContextVar[bool] = ContextVar("without_code", default=False)


@contextmanager
def no_code() -> Iterator[None]:
    """A block in which no configuration that transformers reads names code."""
    before = _without.set(True)
    try:
        yield
    finally:
        _without.reset(before)


def as_trusted(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config.json as transformers may see them: without code in :func:`no_code`."""
    return without_code(entries) if _without.get() else dict(entries)


def without_code(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config.json, and of the parts in it, that name no code."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in entries.items()
        if key != _CODE and _is_known(value, _IMPLEMENTATIONS.get(key))
    }


def _is_known(value: Any, known: tuple[str, ...] | None) -> bool:
    """Whether an implementation, or each of several by part, is a known one; None is a default."""
    if known is None or value is None:
        return True
    named = value.values() if isinstance(value, Mapping) else [value]
    return all(each is None or each in known for each in named)
