"""A budget of a whole model: which of its matrices gets how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnmoe.errors import InputError, check_number_in, check_positive_int, short_repr

# Points of a Pareto front that are kept. A front with more of them is thinned out.
_MOST_POINTS = 1 << 13

# Sums of two costs up to this one fit into 64 bits.
_LARGEST_BUDGET = (1 << 62) - 1


class _Front(NamedTuple):
    """Choices for the first matrices of which no other is smaller and has less error.

    Sizes rise and errors fall. ``before`` and ``option`` lead back to the choices.
    """

    sizes: np.ndarray
    errors: np.ndarray
    before: np.ndarray
    option: np.ndarray


def distribute_budget(
    options: Sequence[Sequence[tuple[int, float]]], budget: int
) -> tuple[int, ...]:
    """Choose an option for every matrix of a model, with least error within a budget.

    Parameters
    ----------
    options : sequence of sequence of (int, float)
        For every matrix: what each option costs, in parameters or bytes, and its squared error. The
        error may be weighed, for instance by what the matrix does to the model's output.
    budget : int
        Largest sum of the costs.

    Returns
    -------
    tuple of int
        For every matrix the number of its option.

    Raises
    ------
    InputError
        If a matrix has no option, a number is out of range, or the cheapest options exceed the
        budget.

    Notes
    -----
    This is the multiple-choice knapsack problem (Sinha, Zoltners, Oper. Res. 27, 503 (1979)). The
    function adds one matrix after the other, and keeps the choices of which no other is smaller and
    has less error. With up to 8,192 of these the result is the optimum. Beyond, it keeps one of
    those that differ by less than 1/8,192 of the budget: the result is then at least as good as the
    optimum of a budget that is smaller by this share for every matrix.

    Examples
    --------
    >>> cheap_or_exact = [(10, 4.0), (100, 0.0)]
    >>> distribute_budget([cheap_or_exact, [(10, 9.0), (50, 1.0), (100, 0.0)]], 150)
    (1, 1)
    """
    budget = check_positive_int("budget", budget)
    if budget > _LARGEST_BUDGET:
        raise InputError(f"budget must be at most {_LARGEST_BUDGET}, got {budget}")
    tables = [_table(number, each, budget) for number, each in enumerate(options)]
    least = sum(int(sizes.min()) for sizes, _ in tables)
    if least > budget:
        raise InputError(f"budget={budget} is too small: the cheapest options cost {least}")
    # What the matrices to come cost at least.
    reserve = least
    fronts: list[_Front] = []
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    for own_sizes, own_errors in tables:
        reserve -= int(own_sizes.min())
        front = _front(sizes, errors, own_sizes, own_errors)
        front = _thinned(_first(front, front.sizes <= budget - reserve), budget)
        fronts.append(front)
        sizes, errors = front.sizes, front.errors
    return _choices(fronts)


def _table(
    number: int, options: Sequence[tuple[int, float]], budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the checked costs of a matrix, cut to just beyond the budget, and its errors."""
    if not isinstance(options, Sequence):
        raise InputError(f"matrix {number} needs a sequence of options, got {short_repr(options)}")
    if not options:
        raise InputError(f"matrix {number} has no options")
    for option in options:
        if not isinstance(option, Sequence) or len(option) != 2:
            raise InputError(f"an option is a cost and an error, got {short_repr(option)}")
    sizes = [check_positive_int(f"every cost of matrix {number}", size) for size, _ in options]
    errors = [
        check_number_in(f"every error of matrix {number}", error, "[0, inf)")
        for _, error in options
    ]
    return np.array([min(size, budget + 1) for size in sizes], np.int64), np.array(errors)


def _front(
    sizes: np.ndarray, errors: np.ndarray, own_sizes: np.ndarray, own_errors: np.ndarray
) -> _Front:
    """Combine a front with all options of another matrix, and drop what is worse."""
    own = _useful(own_sizes, own_errors)
    all_sizes = (sizes[:, None] + own_sizes[own]).ravel()
    all_errors = (errors[:, None] + own_errors[own]).ravel()
    kept = _useful(all_sizes, all_errors)
    before, option = np.divmod(kept, len(own))
    return _Front(all_sizes[kept], all_errors[kept], before, own[option])


def _useful(sizes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return, by size, the numbers of those of which no other is smaller and has less error."""
    order = np.lexsort((errors, sizes))
    falling = errors[order]
    best = np.minimum.accumulate(falling)
    return order[np.concatenate([[True], falling[1:] < best[:-1]])]


def _first(front: _Front, kept: np.ndarray) -> _Front:
    return _Front(*(array[kept] for array in front))


def _thinned(front: _Front, budget: int) -> _Front:
    """Keep, of choices that cost nearly the same, the one with least error."""
    if len(front.sizes) <= _MOST_POINTS:
        return front
    buckets = front.sizes // (budget // _MOST_POINTS + 1)
    # The last one of a bucket has the least error.
    return _first(front, np.append(buckets[1:] != buckets[:-1], True))


def _choices(fronts: Sequence[_Front]) -> tuple[int, ...]:
    """Follow the best point of the last front back to the options."""
    place = len(fronts[-1].sizes) - 1 if fronts else 0
    chosen = []
    for front in reversed(fronts):
        chosen.append(int(front.option[place]))
        place = int(front.before[place])
    return tuple(reversed(chosen))
