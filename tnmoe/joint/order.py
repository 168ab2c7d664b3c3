"""The order of one matrix' rows and columns, and the places of its legs, for a truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.indexing import rows_of
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import widened
from tnmoe.decompose import check_matrix, decompose
from tnmoe.errors import InputError, check_bool, check_number_in, check_positive_int
from tnmoe.joint.align import best_order
from tnmoe.mpo import MPO
from tnmoe.options import Method
from tnmoe.shapes import MPOShape

# Gain that is rounding, in units of the matrix' rounding.
_ROUNDING = 100

# Arrangements of legs that are tried at most.
_MOST_SHAPES = 64


@dataclass(frozen=True)
class OrderedDecomposition:
    """An MPO of a matrix whose rows and columns changed places.

    Attributes
    ----------
    mpo : MPO
        Of ``matrix[rows][:, columns]``.
    rows : array of int, shape (out_features,)
    columns : array of int, shape (in_features,)
    errors : tuple of float
        Relative error of the given order, and of every order or arrangement of legs that made it
        smaller. It falls from one to the next.

    Examples
    --------
    >>> found = decompose_ordered(np.eye(8), MPOShape((2, 4), (2, 4)))
    >>> found.gain, found.rows
    (0.0, array([0, 1, 2, 3, 4, 5, 6, 7]))
    """

    mpo: MPO
    rows: np.ndarray = field(repr=False)
    columns: np.ndarray = field(repr=False)
    errors: tuple[float, ...]

    @property
    def gain(self) -> float:
        """By what part the error of the given order fell; 0 if no other order is better."""
        first, last = self.errors[0], self.errors[-1]
        return 1 - last / first if first else 0.0


def decompose_ordered(
    matrix: Array,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    max_params: int | None = None,
    method: Method = "auto",
    order_rows: bool = True,
    order_columns: bool = False,
    arrange_legs: bool = False,
    max_rounds: int = 10,
    tol: float = 1e-3,
) -> OrderedDecomposition:
    """Decompose a matrix in the order of rows and columns that loses little.

    Hidden units may change places without changing their network: they are the rows of ``up`` and
    ``gate`` and the columns of ``down``. (One order must serve all of them:
    :func:`decompose_aligned` finds it.) The function tries rows and columns sorted by their norms.
    Then it moves them to where they are nearest to what the decomposition made of the matrix, and
    decomposes anew, as long as the error falls.

    Parameters
    ----------
    matrix : array, shape (out_features, in_features)
        NumPy array or torch tensor.
    shape : MPOShape, optional
        Legs of the MPO, as for :func:`decompose`.
    max_bond, max_params, method
        As for :func:`decompose`.
    order_rows, order_columns : bool
        What may change places.
    arrange_legs : bool
        Also try other arrangements of the output legs over the sites, and of the input legs, that
        need no more parameters.
    max_rounds : int
        Largest number of decompositions after the sorted one.
    tol : float
        Take an order, and go on, if it makes the error smaller by more than this part.

    Returns
    -------
    OrderedDecomposition
        With the given order and shape if no other one gains.

    Raises
    ------
    InputError, TypeError
        As for :func:`decompose`; if there are more than 64 arrangements of the legs.

    Notes
    -----
    Sorting gains where norms differ: Schmidt vectors then meet blocks of large and of small
    numbers. On matrices of 1536 × 384 of a trained MiniLM it lowered the error from 0.84 to 0.80
    with three sites at bond 32, from 0.69 to 0.67 with five sites at bond 96, and from 0.68 to 0.58
    with the split shape of 24 groups at bond 12, each with the hidden units as rows. On random
    matrices it gained 0.4, 0.3 and 3 %. So most of the error stays. Arrangements of three legs
    differed by 2 % at equal parameters, and by as much on random matrices.

    Examples
    --------
    >>> small, large = np.ones((4, 6)), 100 * np.arange(24.0).reshape(4, 6)
    >>> mixed = np.stack([small, large], axis=1).reshape(8, 6)
    >>> decompose_ordered(mixed, MPOShape((2, 4), (1, 6)), max_bond=1).gain > 0.9
    True
    """
    shape = check_matrix(matrix, shape, axes=2)
    movable = check_bool("order_rows", order_rows), check_bool("order_columns", order_columns)
    max_rounds = check_positive_int("max_rounds", max_rounds)
    tol = check_number_in("tol", tol, "[0, 1)")
    shapes = _arrangements(shape) if check_bool("arrange_legs", arrange_legs) else []
    limits = {"max_bond": max_bond, "max_params": max_params, "method": method}
    given = np.arange(matrix.shape[0]), np.arange(matrix.shape[1])
    first = best = _Trial.of(matrix, shape, given, limits)
    errors, rounding = [best.error], _ROUNDING * EPSILON[get_backend(matrix).dtype_name(matrix)]

    def is_better(trial: _Trial) -> bool:
        fits = trial.mpo.num_params <= first.mpo.num_params
        return fits and trial.error < best.error * (1 - tol) - rounding

    orders = _by_norms(matrix, movable)
    for number in range(max_rounds + 1):
        trial = _Trial.of(matrix, shape, orders, limits)
        if is_better(trial):
            best, errors = trial, [*errors, trial.error]
        elif number:
            break
        orders = best.next_orders(matrix, movable)
    for other in shapes:
        trial = _Trial.of(matrix, other, best.orders, limits)
        if is_better(trial):
            best, errors = trial, [*errors, trial.error]
    return OrderedDecomposition(best.mpo, *best.orders, tuple(errors))


@dataclass(frozen=True)
class _Trial:
    """An order of rows and columns, and the MPO of the matrix in it."""

    orders: tuple[np.ndarray, np.ndarray]
    mpo: MPO
    error: float

    @classmethod
    def of(
        cls,
        matrix: Array,
        shape: MPOShape,
        orders: tuple[np.ndarray, np.ndarray],
        limits: dict[str, Any],
    ) -> _Trial:
        """Decompose a matrix in an order; the error is measured in double precision."""
        xp, (rows, columns) = get_backend(matrix), (order.tolist() for order in orders)
        turned = xp.transpose(rows_of(xp, matrix, rows))
        ordered = xp.transpose(rows_of(xp, turned, columns))
        mpo, wide = decompose(ordered, shape, **limits), widened(xp, ordered)
        with xp.full_precision(wide):
            missed = wide - widened(xp, mpo.to_matrix())
        error, norm = (number_of(xp, xp.norm(each)) for each in (missed, wide))
        return cls(orders, mpo, error / norm if norm else 0.0)

    def next_orders(
        self, matrix: Array, movable: tuple[bool, bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move rows, then columns, to where they are nearest to the MPO's."""
        xp, (rows, columns) = get_backend(matrix), self.orders
        built = xp.to_numpy(widened(xp, self.mpo.to_matrix()))
        wide = xp.to_numpy(widened(xp, matrix))
        if movable[0]:
            rows = rows[best_order(built, wide[rows][:, columns], np.arange(len(rows)))]
        if movable[1]:
            moved = wide[rows][:, columns].T
            columns = columns[best_order(built.T, moved, np.arange(len(columns)))]
        return rows, columns


def _by_norms(matrix: Array, movable: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows and columns by their norms, where they may move."""
    wide = get_backend(matrix).to_numpy(widened(get_backend(matrix), matrix))
    scaled = wide / (np.abs(wide).max() or 1.0)
    norms = np.linalg.norm(scaled, axis=1), np.linalg.norm(scaled, axis=0)
    rows, columns = (
        np.argsort(norm, kind="stable") if moves else np.arange(len(norm))
        for norm, moves in zip(norms, movable, strict=True)
    )
    return rows, columns


def _arrangements(shape: MPOShape) -> list[MPOShape]:
    """Return shapes with the same legs at other sites."""
    kinds = [sorted(set(permutations(dims))) for dims in (shape.out_dims, shape.in_dims)]
    if len(kinds[0]) * len(kinds[1]) > _MOST_SHAPES:
        raise InputError(
            f"arrange_legs=True tries up to {_MOST_SHAPES} arrangements of the legs, and {shape} "
            f"has {len(kinds[0]) * len(kinds[1])}: give fewer sites"
        )
    size = shape.out_features, shape.in_features
    return [MPOShape(outs, ins, *size) for outs, ins in product(*kinds)]
