"""Purposes of unfinished folders: on one line, everything that the bytes of a target depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tnmoe.errors import short_repr


def purpose_line(content: Mapping[str, Any]) -> str:
    """Return a purpose as one line of text, the same for equal contents."""
    return json.dumps(content, sort_keys=True, default=str)


def difference(there: str, here: str) -> str:
    """Say in which entry two purposes differ; return an empty text for a line of another kind.

    Examples
    --------
    >>> there, here = ({"settings": {"seed": seed}} for seed in (0, 1))
    >>> difference(purpose_line(there), purpose_line(here))
    'settings.seed is 0 there and 1 here'
    """
    try:
        return _first_difference(json.loads(there), json.loads(here))
    except (ValueError, RecursionError):
        return ""


def _first_difference(there: Any, here: Any, path: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            inner = f"{path}.{name}" if path else name
            if found := _first_difference(there.get(name), here.get(name), inner):
                return found
        return ""
    if there == here or not path:
        return ""
    if isinstance(there, list | dict) or isinstance(here, list | dict):
        return f"{path} differs"
    return f"{path} is {short_repr(there)} there and {short_repr(here)} here"
