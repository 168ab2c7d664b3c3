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
        super().__init__(as_line(message))


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


def as_line(message: object) -> str:
    """A message on one line, without the middle of what is very long."""
    line = " ".join(str(message).split())
    first, last = _KEPT
    return f"{line[:first]} … {line[-last:]}" if len(line) > first + last else line


def reason(error: OSError) -> str:
    """What went wrong, also where the system did not say it but a library."""
    return as_line(error.strerror or error) or type(error).__name__


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
        raise InputError(
            f"{name} must be one of {', '.join(map(str, allowed))}, got {shown(value)}"
        )


def plain(value: Any) -> Any:
    """A NumPy scalar, or an array or tensor without axes, as Python's own; others as they are."""
    return value.item() if getattr(value, "shape", None) == () else value


def flag(name: str, value: Any) -> bool:
    """The value as a bool, 0 and 1 included; an InputError for any other."""
    one_of(name, plain(value), (False, True))
    return bool(value)


def number_in(name: str, value: Any, interval: str) -> float:
    """The value as a float; an InputError unless it is a number in an interval like "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    scalar = plain(value)
    try:
        number = float("nan") if isinstance(scalar, str | bytes | bool) else float(scalar)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise InputError(f"{name} must be in {interval}, got {shown(value)}")
    return number


def _integer(value: Any) -> int | None:
    """The value as an int, NumPy's and torch's included; None if it is no integer, or a bool."""
    scalar = plain(value)
    is_integer = isinstance(scalar, Integral) and not isinstance(scalar, bool)
    return int(scalar) if is_integer else None


def positive_int(name: str, value: Any) -> int:
    """The value as an int, NumPy's and torch's included; an InputError unless it is 1 or more."""
    number = _integer(value)
    if number is None or number < 1:
        raise InputError(f"{name} must be a positive integer, got {shown(value)}")
    return number


def integer_from_zero(name: str, value: Any) -> int:
    """The value as an int, NumPy's and torch's included; an InputError unless it is 0 or more."""
    number = _integer(value)
    if number is None or number < 0:
        raise InputError(f"{name} must be an integer of at least 0, got {shown(value)}")
    return number


def index_in(name: str, value: Any, count: int) -> int:
    """The value as an int, NumPy's and torch's included; an InputError unless it counts from 0."""
    if type(value) is int and 0 <= value < count:  # the usual case, in inner loops
        return value
    number = _integer(value)
    if number is None or not 0 <= number < count:
        raise InputError(f"{name} must be an integer from 0 to {count - 1}, got {shown(value)}")
    return number


def generator_of(rng: Any) -> np.random.Generator:
    """A NumPy Generator as it is, or one of that seed; an InputError where it is neither."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"rng must be a NumPy Generator or an integer of at least 0, got {shown(rng)}"
        ) from error
