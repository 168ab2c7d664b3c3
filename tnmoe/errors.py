"""The two errors that tnmoe raises about what its caller gave or has installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something the caller gave does not fit; the message names it and what was expected.

    The command line turns it into one line and exit code 2. A plain ``ValueError`` from inside
    tnmoe is therefore a bug, and keeps its traceback.
    """


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.package = package
        super().__init__(
            f"{feature} needs {package}, which is not installed: pip install 'tnmoe[{extra}]'"
        )


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise an InputError unless the value is one of those."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
