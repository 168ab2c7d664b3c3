"""Joint decompositions and the order of hidden units, by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import widened
from tnmoe.errors import InputError, check_number_in, check_positive_int
from tnmoe.joint.align import UnitAlignment, align_hidden_units, alignment_of
from tnmoe.shared_mpo import SharedMPO

_NAMES = ("up", "down", "gate")

# Gain that is rounding, in units of the matrices' rounding.
_ROUNDING = 100

# Singular values of a chain that are smaller relative to the largest are rounding.
_RANK = 1e-6

Decompose = Callable[[str, Array], SharedMPO]


@dataclass(frozen=True)
class AlignedDecomposition:
    """Joint decompositions of networks whose hidden units changed places.

    Attributes
    ----------
    up, down : SharedMPO
        The decompositions of the aligned matrices.
    gate : SharedMPO or None
    alignment : UnitAlignment
        The order of hidden units, which ``alignment.apply`` gives the networks.
    errors : tuple of float
        Root mean square of the relative errors of all matrices: in the given order, and for every
        order that made it smaller. It falls from one to the next.

    Examples
    --------
    >>> from tnmoe import decompose_shared
    >>> equal = np.ones((3, 8, 5)), np.ones((3, 5, 8))
    >>> def with_base(name, matrices):
    ...     return decompose_shared(matrices, residual=True, max_bond=1)
    >>> found = decompose_aligned(*equal, decompose=with_base)
    >>> found.gain, found.alignment.permutations[0]
    (0.0, array([0, 1, 2, 3, 4, 5, 6, 7]))
    """

    up: SharedMPO
    down: SharedMPO
    gate: SharedMPO | None
    alignment: UnitAlignment = field(repr=False)
    errors: tuple[float, ...]

    @property
    def gain(self) -> float:
        """By what part the error of the given order fell; 0 if no other order is better."""
        first, last = self.errors[0], self.errors[-1]
        return 1 - last / first if first else 0.0


def decompose_aligned(
    up: Array,
    down: Array,
    gate: Array | None = None,
    *,
    decompose: Decompose,
    max_rounds: int = 10,
    tol: float = 1e-4,
) -> AlignedDecomposition:
    """Decompose the matrices of several networks jointly, and order their hidden units for that.

    The order of hidden units is free, and what a joint decomposition loses depends on it. The
    function decomposes the matrices in the given order, in that of :func:`align_hidden_units`, and,
    unless there is a base, with the aligned units sorted by their norms. From the best one on,
    every network's units move to where they are nearest to what the decomposition made of the
    network, and the decomposition starts anew, as long as its error falls. Beside a base the units
    move to where they are nearest to the base, apart from what the network's own chain can add to
    any unit: the chain follows them.

    Parameters
    ----------
    up : array, shape (E, F, H)
        Matrices into the hidden units: NumPy arrays or torch tensors.
    down : array, shape (E, H, F)
        Matrices out of the hidden units.
    gate : array, shape (E, F, H), optional
        Matrices of the gates.
    decompose : callable
        Takes ``"up"``, ``"down"`` or ``"gate"`` and the matrices, and returns their SharedMPO:
        :func:`decompose_shared` with the caller's settings.
    max_rounds : int
        Largest number of rounds from the best of these orders on.
    tol : float
        Take an order, and go on, if it makes the error smaller by more than this part.

    Returns
    -------
    AlignedDecomposition
        With the given order if no other order gains.

    Raises
    ------
    InputError
        If the matrices do not belong to the same networks, or hold NaN or infinity; if
        ``decompose`` returns something else than a SharedMPO of the matrices.

    Notes
    -----
    A round costs a decomposition of all matrices, and E assignment problems of F units.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> up, down = rng.normal(size=(8, 5)), rng.normal(size=(5, 8))
    >>> orders = [rng.permutation(8) for _ in range(3)]
    >>> ups = np.stack([up[order] for order in orders])
    >>> downs = np.stack([down[:, order] for order in orders])
    >>> from tnmoe import decompose_shared
    >>> def with_base(name, matrices):
    ...     return decompose_shared(matrices, residual=True, max_bond=1)
    >>> decompose_aligned(ups, downs, decompose=with_base).gain > 0.999
    True
    """
    max_rounds = check_positive_int("max_rounds", max_rounds)
    tol = check_number_in("tol", tol, "[0, 1)")
    matrices = [up, down] if gate is None else [up, down, gate]
    aligned = align_hidden_units(*matrices).permutations
    given = np.tile(np.arange(aligned.shape[1]), (aligned.shape[0], 1))
    best = _Round.of(given, matrices, decompose)
    least = _ROUNDING * EPSILON[get_backend(up).dtype_name(up)]
    errors = [best.error]

    def improves(orders: np.ndarray) -> bool:
        nonlocal best
        if (orders == best.orders).all():
            return False
        other = _Round.of(orders, matrices, decompose)
        is_better = other.error < best.error * (1 - tol) - least
        if is_better:
            best = other
            errors.append(other.error)
        return is_better

    improves(aligned)
    if not best.has_base:
        improves(_by_norms(matrices, aligned))
    for _ in range(max_rounds):
        if not improves(best.next_orders()):
            break
    alignment = alignment_of(matrices, best.orders, len(errors) - 1)
    gate_ = None if gate is None else best.shared[2]
    return AlignedDecomposition(best.shared[0], best.shared[1], gate_, alignment, tuple(errors))


@dataclass(frozen=True)
class _Round:
    """An order of hidden units, and what a joint decomposition makes of it.

    Attributes
    ----------
    orders : array of int, shape (E, F)
    matrices : list of array
        In this order.
    shared : list of SharedMPO
    approximations : list of array
        What the decompositions stand for.
    error : float
        Root mean square of the relative errors.
    """

    orders: np.ndarray
    matrices: list[Array]
    shared: list[SharedMPO]
    approximations: list[Array]
    error: float

    @classmethod
    def of(cls, orders: np.ndarray, given: Sequence[Array], decompose: Decompose) -> _Round:
        """Decompose matrices in an order of their units."""
        matrices = list(alignment_of(given, orders).apply(*given))
        shared = [decompose(*pair) for pair in zip(_NAMES, matrices, strict=False)]
        for name, each, matrix in zip(_NAMES, shared, matrices, strict=False):
            _check(name, each, matrix)
        approximations = [each.to_matrices() for each in shared]
        errors = [_error(*pair) for pair in zip(matrices, approximations, strict=True)]
        error = float(np.linalg.norm(errors) / len(errors) ** 0.5)
        return cls(orders, matrices, shared, approximations, error)

    @property
    def has_base(self) -> bool:
        """Whether all matrices have a base, which follows an order that all experts share."""
        return all(each.base is not None for each in self.shared)

    def next_orders(self) -> np.ndarray:
        """Return the order, (E, F), that brings the units nearest to their targets."""
        targets = self.approximations
        if self.has_base:
            pairs = zip(self.shared, self.approximations, strict=True)
            targets = [_rest_of_base(*pair, index == 1) for index, pair in enumerate(pairs)]
        move = align_hidden_units(*self.matrices, toward=targets)
        return np.take_along_axis(self.orders, move.permutations, axis=1)


def _by_norms(matrices: Sequence[Array], orders: np.ndarray) -> np.ndarray:
    """Sort the units, which have an order, by their norms over all experts and matrices."""
    total = np.zeros(orders.shape[1])
    for name, matrix in zip(_NAMES, alignment_of(matrices, orders).apply(*matrices), strict=False):
        xp = get_backend(matrix)
        squares = np.abs(xp.to_numpy(widened(xp, matrix))) ** 2
        total += squares.sum((0, 1) if name == "down" else (0, 2)) / (squares.sum() or 1.0)
    return orders[:, np.argsort(total, kind="stable")]


def _rest_of_base(shared: SharedMPO, approximation: Array, is_down: bool) -> np.ndarray:
    """Return the base without what every expert's chain can add to a unit, (E, out, in).

    An order changes which unit meets which row of the base. The expert's own core follows it, so
    the span of the rows of its chain does not count.
    """
    assert shared.base is not None
    xp = get_backend(approximation)
    base = xp.to_numpy(widened(xp, shared.base.to_matrix()))
    chains = xp.to_numpy(widened(xp, approximation)) - base
    if is_down:
        base, chains = base.T, chains.swapaxes(1, 2)
    _, values, rows = np.linalg.svd(chains, full_matrices=False)
    rows = rows * (values > _RANK * values[:, :1])[..., None]
    rest = base - base @ rows.conj().swapaxes(1, 2) @ rows
    return rest.swapaxes(1, 2) if is_down else rest


def _check(name: str, shared: SharedMPO, matrix: Array) -> None:
    if not isinstance(shared, SharedMPO):
        raise InputError(f"decompose must return a SharedMPO for {name}, got {type(shared)}")
    shape = shared.num_experts, shared.shape.out_features, shared.shape.in_features
    if shape != tuple(matrix.shape):
        raise InputError(
            f"decompose must return a SharedMPO of {name}'s shape {tuple(matrix.shape)}, got "
            f"{shape}"
        )


def _error(matrices: Array, approximations: Array) -> float:
    """Return the root mean square of relative errors, in double precision."""
    xp, errors = get_backend(matrices), []
    for matrix, other in zip(matrices, approximations, strict=True):
        wide = widened(xp, matrix)
        error, norm = (number_of(xp, xp.norm(each)) for each in (wide - widened(xp, other), wide))
        errors.append(error / norm if norm else float(error > 0))
    return float(np.linalg.norm(errors) / len(errors) ** 0.5)
