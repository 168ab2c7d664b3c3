"""How a public name leaves: it works for two more minor versions, and says what to use instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def deprecated(since: str, use: str) -> Callable[[F], F]:
    """Mark a function or method as one that will go.

    Parameters
    ----------
    since : str
        Version that says so first.
    use : str
        What to write instead.

    Returns
    -------
    callable
        Decorator. The function does what it did, after a ``DeprecationWarning`` that points at
        its caller; its docstring begins with the same words.

    Examples
    --------
    >>> @deprecated("0.2", use="tnmoe.factorize")
    ... def split(size):
    ...     "Legs of a size."
    >>> split.__doc__.splitlines()[0]
    'Deprecated since 0.2: use tnmoe.factorize.'
    """

    def decorate(function: F) -> F:
        note = f"eprecated since {since}: use {use}"

        @functools.wraps(function)
        def warned(*args: Any, **kwargs: Any) -> Any:
            _warn(f"{function.__qualname__} is d{note}")
            return function(*args, **kwargs)

        warned.__doc__ = f"D{note}.\n\n{function.__doc__ or ''}".rstrip()
        return warned  # type: ignore[return-value]

    return decorate


def renamed_parameter(old: str, new: str, since: str) -> Callable[[F], F]:
    """Let a function take a keyword by its former name.

    Parameters
    ----------
    old, new : str
        Names of the parameter.
    since : str
        Version that has the new name first.

    Returns
    -------
    callable
        Decorator. ``old=value`` counts as ``new=value``, after a ``DeprecationWarning`` that
        points at the caller; both at once are a ``TypeError``, as any argument given twice is.

    Examples
    --------
    >>> @renamed_parameter("rank", "max_bond", since="0.2")
    ... def cut(max_bond):
    ...     return max_bond
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     cut(rank=3)
    3
    >>> str(caught[0].message)
    "cut: parameter 'rank' is deprecated since 0.2: use 'max_bond'"
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def translated(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                name = function.__qualname__
                if new in kwargs:
                    raise TypeError(f"{name}: got both {old!r} and {new!r}, two names of one")
                _warn(f"{name}: parameter {old!r} is deprecated since {since}: use {new!r}")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return translated  # type: ignore[return-value]

    return decorate


def _warn(message: str) -> None:
    # Beyond this function and the wrapper is the caller.
    warnings.warn(message, DeprecationWarning, stacklevel=3)
