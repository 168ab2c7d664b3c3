"""The two errors that tnmoe raises about what its caller gave or has installed, and checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np

# Characters of a message that are kept, from its beginning and from its end.
_KEPT = 600, 300


class InputError(ValueError):
    """Something the caller gave does not fit; the message names it and what was expected.

    The command line turns it into one line and exit code 2. A plain ``ValueError`` from inside
    tnmoe is therefore a bug, and keeps its traceback.

    Parameters
    ----------
    message : str
        It may quote what others wrote: it becomes a single line, and what is very long loses its
        middle.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> MPOShape((2, 3), (4,))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tnmoe.errors.InputError: out_dims and in_dims need one leg per site each: got ...
    """

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.split())
        first, last = _KEPT
        super().__init__(f"{line[:first]} … {line[-last:]}" if len(line) > first + last else line)


class MissingExtraError(ImportError):
    """Optional dependencies are not installed; the message names the extra that brings them.

    Parameters
    ----------
    feature, extra : str
        What needs them, and the extra.
    missing : iterable of str
        Packages that are not installed.
    old : mapping of str to str, optional
        What is needed, as ``transformers>=5.0``, where another version is installed; and which.

    Examples
    --------
    >>> raise MissingExtraError("tnmoe.plot", "plot", ["matplotlib"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tnmoe.errors.MissingExtraError: tnmoe.plot needs matplotlib, which is not installed: ...
    """

    def __init__(
        self,
        feature: str,
        extra: str,
        missing: Iterable[str],
        old: Mapping[str, str] | None = None,
    ) -> None:
        missing = list(missing)
        lacks = [f"{needed}, but {found} is installed" for needed, found in (old or {}).items()]
        if missing:
            *others, last = missing
            names = f"{', '.join(others)} and {last}" if others else last
            lacks.insert(0, f"{names}, which {'are' if others else 'is'} not installed")
        super().__init__(f"{feature} needs {', and '.join(lacks)}: pip install 'tnmoe[{extra}]'")


# Characters of a value that a message shows.
_SHOWN = 120


def shown(value: Any) -> str:
    """The value as a message shows it: on one line, and not for ever."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise an InputError unless the value is one of those."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def number_in(name: str, value: Any, interval: str) -> float:
    """The value as a float; an InputError unless it is a number in an interval like "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    try:
        number = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise InputError(f"{name} must be in {interval}, got {value!r}")
    return number


def positive_int(name: str, value: object) -> int:
    """``value`` as an int of at least 1, NumPy integers included; otherwise an InputError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def integer_from_zero(name: str, value: Any) -> int:
    """The value as an int, NumPy's integers included; an InputError if it is below 0 or none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} must be an integer of at least 0, got {value!r}")
    return int(value)


def index_in(name: str, value: Any, count: int) -> int:
    """The value as an int, NumPy's integers included; an InputError unless it counts from 0."""
    if type(value) is int and 0 <= value < count:  # the usual case, in inner loops
        return value
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1
    if not 0 <= number < count:
        raise InputError(f"{name} must be an integer from 0 to {count - 1}, got {value!r}")
    return number


def generator_of(rng: Any) -> np.random.Generator:
    """A NumPy Generator as it is, or one of that seed; an InputError where it is neither."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"rng must be a NumPy Generator or an integer of at least 0, got {rng!r}"
        ) from error
