"""Keeping a folder from running code that neither tnmoe nor transformers contains.

Such code comes from modules in the folder or on the Hub, which ``auto_map`` names, and from kernels
on the Hub, which implementations of attention and of experts name. If the caller did not say
whether to trust it, transformers asks on standard input, or downloads it. Here such entries are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Entry of config.json that names modules with code.
_CODE = "auto_map"

# Implementations in transformers and tnmoe, by the entries that choose one.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm", "tnmoe")
_IMPLEMENTATIONS = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
}

_refused: ContextVar[bool] = ContextVar("foreign_code_refused", default=False)


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """Hide foreign code from transformers in a block: see :func:`allowed_entries`."""
    before = _refused.set(True)
    try:
        yield
    finally:
        _refused.reset(before)


def allowed_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json that transformers may see.

    In a block of :func:`no_foreign_code` they are those :func:`without_foreign_code`, elsewhere
    all.
    """
    return without_foreign_code(entries) if _refused.get() else dict(entries)


def without_foreign_code(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of a config.json, and of its parts, except those that name foreign code."""
    return {
        key: without_foreign_code(value) if isinstance(value, Mapping) else value
        for key, value in entries.items()
        if key != _CODE and _is_known(value, _IMPLEMENTATIONS.get(key))
    }


def _is_known(value: Any, known: tuple[str, ...] | None) -> bool:
    """Check that an implementation is known, or every one in a mapping by part; None is default."""
    if known is None or value is None:
        return True
    named = value.values() if isinstance(value, Mapping) else [value]
    return all(name is None or name in known for name in named)
