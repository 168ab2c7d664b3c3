"""Results of cases as files, so that a benchmark goes on where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def kept(file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, or compute it and store it there."""
    if not file.exists():
        result = compute()
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(file)
    return json.loads(file.read_text())


def slug(name: str) -> str:
    """Return a name that fits into a file's."""
    return re.sub(r"[^a-z0-9²]+", "-", name.lower()).strip("-")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name has one of some patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)
