"""Ranks for many matrices: the best choice for every number of parameters, from none to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """The ranks of the matrices of all experts.

    Attributes
    ----------
    ranks : tuple of int
    num_params : int
        Number of stored numbers.
    error : float
        Sum of the squared errors.
    """

    ranks: tuple[int, ...]
    num_params: int
    error: float


def best_allocations(
    ranks: np.ndarray, costs: np.ndarray, errors: np.ndarray, most: int
) -> list[Allocation]:
    """Return allocations on the lower convex hull of all allocations, smallest first.

    Parameters
    ----------
    ranks : array of int, shape (n,)
        Ranks that every matrix may have, ascending.
    costs : array of int, shape (n,)
        Number of stored numbers of a matrix of each rank, ascending.
    errors : array, shape (E, n)
        Squared errors of every matrix, descending to 0.
    most : int
        Largest number of allocations. Those that stay are spread evenly over the costs.

    Returns
    -------
    list of Allocation
        The last one has the largest rank everywhere.

    Notes
    -----
    The hull of a sum has the edges of all hulls, steepest first (Shoham, Gersho, IEEE Trans.
    Acoust. Speech Signal Process. 36, 1445 (1988)). No other allocation lies below the hull.

    Examples
    --------
    >>> errors = np.array([[9.0, 1.0, 0.0], [4.0, 3.0, 0.0]])
    >>> found = best_allocations(np.arange(3), np.array([0, 4, 6]), errors, most=9)
    >>> [each.ranks for each in found]
    [(0, 0), (1, 0), (1, 2), (2, 2)]
    """
    hulls = [_lower_hull(costs, own) for own in errors]
    places = np.concatenate([hull[1:] for hull in hulls])
    experts = np.repeat(np.arange(len(hulls)), [len(hull) - 1 for hull in hulls])
    rises = np.concatenate([np.diff(costs[hull]) for hull in hulls])
    drops = np.concatenate([-np.diff(own[hull]) for own, hull in zip(errors, hulls, strict=True)])
    # The sort is stable: edges of one hull keep their order.
    order = np.argsort(-drops / rises, kind="stable")
    places, experts, rises, drops = (each[order] for each in (places, experts, rises, drops))
    sizes = np.concatenate([[0], np.cumsum(rises)])
    # Sums from the end lose nothing of small errors.
    left = np.concatenate([np.cumsum(drops[::-1])[::-1], [0.0]])
    chosen, found, before = np.zeros(len(hulls), np.int64), [], 0
    for taken in _spread(sizes, most):
        # Of several edges of one expert the last is the largest.
        for expert, place in zip(experts[before:taken], places[before:taken], strict=True):
            chosen[expert] = place
        before = taken
        size = int(sizes[taken]) + len(hulls) * int(costs[0])
        found.append(Allocation(tuple(ranks[chosen].tolist()), size, float(left[taken])))
    return found


def _lower_hull(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the numbers of the points on the lower convex hull (Andrew's monotone chain)."""
    hull: list[int] = []
    for point in range(len(costs)):
        while len(hull) > 1 and not _turns_up(costs, errors, (*hull[-2:], point)):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _turns_up(costs: np.ndarray, errors: np.ndarray, points: Sequence[int]) -> bool:
    """Return whether the second of three points lies below the line from the first to the third."""
    first, second, third = points
    rise, whole = errors[second] - errors[first], errors[third] - errors[first]
    return bool(rise * (costs[third] - costs[first]) < whole * (costs[second] - costs[first]))


def _spread(sizes: np.ndarray, most: int) -> list[int]:
    """Choose ``most`` places of ascending sizes at most, evenly by size, and always the last."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    targets = np.linspace(sizes[-1], sizes[0], most)
    return np.unique(np.searchsorted(sizes, targets, side="right") - 1).tolist()
