"""The exceptions for unsuitable arguments and missing packages, and checks of arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

import numpy as np

# A longer message loses its middle. It keeps this many characters at its start and at its end.
_KEPT = 600, 300
# Characters that a message quotes of a value, at most.
_SHOWN = 120


class InputError(ValueError):
    """An argument that does not fit; the message names it and says what was expected.

    The command line prints the message on one line and exits with status 2. A plain ``ValueError``
    from inside tnmoe is a bug and keeps its traceback.

    Parameters
    ----------
    message : str
        Shown on a single line. A message of more than 900 characters loses its middle, since it
        may quote text that somebody else wrote.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> MPOShape((2, 3), (4,))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tnmoe.errors.InputError: out_dims and in_dims need one leg per site each: got ...
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(to_one_line(message))


class InputIndexError(InputError, IndexError):
    """An index that does not fit. As from a NumPy array, it is an ``IndexError``."""


class MissingExtraError(ImportError):
    """Optional dependencies that are missing or too old, and the extra that installs them.

    Parameters
    ----------
    feature : str
        The feature that needs the packages.
    extra : str
        The extra of tnmoe that installs them.
    missing : iterable of str
        Packages that are not installed.
    old : mapping of str to str, optional
        For each package that is too old, the requirement (``transformers>=5.0``) and the version
        that is installed.
    install : str, optional
        How to install the packages, where no extra does.

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
        install: str | None = None,
    ) -> None:
        missing = list(missing)
        lacks = [f"{needed}, but {found} is installed" for needed, found in (old or {}).items()]
        if missing:
            *first, last = missing
            names = f"{', '.join(first)} and {last}" if first else last
            lacks.insert(0, f"{names}, which {'are' if first else 'is'} not installed")
        needed = ", and ".join(lacks)
        if install is None:
            super().__init__(f"{feature} needs {needed}: pip install 'tnmoe[{extra}]'")
        else:
            super().__init__(f"{feature} needs {needed}: {install}")


def to_one_line(message: object) -> str:
    """Put a message on one line, and cut the middle out of a very long one."""
    line = " ".join(str(message).split())
    first, last = _KEPT
    return f"{line[:first]} … {line[-last:]}" if len(line) > first + last else line


def reason_of(error: OSError) -> str:
    """Return the system's reason for an error, or the library's own text where there is none."""
    return to_one_line(error.strerror or error) or type(error).__name__


def short_repr(value: Any) -> str:
    """Return the repr of a value for a message: on one line, and cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_entries(data: Iterable[str], kind: type, what: str) -> None:
    """Raise an InputError if data have an entry that is no field of a dataclass.

    Parameters
    ----------
    data : iterable of str
        Names of the entries.
    kind : type
        The dataclass.
    what : str
        What the data describe, for the message.
    """
    known = {entry.name for entry in fields(kind)}
    if unknown := set(data) - known:
        raise InputError(
            f"unknown entries in {what}: {sorted(unknown)}; known ones are "
            f"{', '.join(sorted(known))}"
        )


def check_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise an InputError unless the value is one of the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise InputError(
            f"{name} must be one of {', '.join(map(str, allowed))}, got {short_repr(value)}"
        )


def to_python_scalar(value: Any) -> Any:
    """Turn a NumPy scalar, or an array or tensor without axes, into a Python scalar.

    Any other value comes back unchanged.
    """
    return value.item() if getattr(value, "shape", None) == () else value


def check_bool(name: str, value: Any) -> bool:
    """Return the value as a bool; raise an InputError unless it is a bool, 0 or 1."""
    check_one_of(name, to_python_scalar(value), (False, True))
    return bool(value)


def check_number_in(name: str, value: Any, interval: str) -> float:
    """Return the value as a float; raise an InputError unless it lies in an interval.

    The interval is written as in mathematics: "[0, 1)" holds 0 and does not hold 1.
    """
    low, high = map(float, interval[1:-1].split(","))
    scalar = to_python_scalar(value)
    try:
        number = float("nan") if isinstance(scalar, str | bytes | bool) else float(scalar)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise InputError(f"{name} must be in {interval}, got {short_repr(value)}")
    return number


def _integer(value: Any) -> int | None:
    """Return an integer of Python, NumPy or torch as an int; None for anything else, or a bool."""
    scalar = to_python_scalar(value)
    is_integer = isinstance(scalar, Integral) and not isinstance(scalar, bool)
    return int(scalar) if is_integer else None


def check_positive_int(name: str, value: Any) -> int:
    """Return an integer of Python, NumPy or torch as an int; raise an InputError below 1."""
    number = _integer(value)
    if number is None or number < 1:
        raise InputError(f"{name} must be a positive integer, got {short_repr(value)}")
    return number


def check_int_from_zero(name: str, value: Any) -> int:
    """Return an integer of Python, NumPy or torch as an int; raise an InputError below 0."""
    number = _integer(value)
    if number is None or number < 0:
        raise InputError(f"{name} must be an integer of at least 0, got {short_repr(value)}")
    return number


def check_index(name: str, value: Any, count: int) -> int:
    """Return an integer from 0 to ``count - 1`` as an int; raise an InputError for any other."""
    if type(value) is int and 0 <= value < count:  # inner loops nearly always come here
        return value
    number = _integer(value)
    if number is None or not 0 <= number < count:
        raise InputError(
            f"{name} must be an integer from 0 to {count - 1}, got {short_repr(value)}"
        )
    return number


def check_generator(rng: Any) -> np.random.Generator:
    """Return a NumPy Generator: the given one, or a new one from a seed.

    Raise an InputError for a value that is neither.
    """
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"rng must be a NumPy Generator or an integer of at least 0, got {short_repr(rng)}"
        ) from error
