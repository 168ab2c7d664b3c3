"""Hidden units of several networks in one order: what a permutation cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.errors import InputError, check_bool, check_positive_int

# Shares of a norm that differ by less are equal.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class UnitAlignment:
    """An order, and scales, of the hidden units of several networks.

    Attributes
    ----------
    permutations : array of int, shape (E, F)
        Unit j of the aligned network e is unit ``permutations[e, j]`` of the given one.
    scales : array of float, shape (E, F)
        Factor of the rows of ``up`` for every aligned unit; the columns of ``down`` are divided by
        it. Ones without rescaling.
    before, after : float
        Share of the squared norm of all units that their mean over the networks explains, or the
        targets, with the units as they are given and aligned. 1 means that all networks are equal,
        or equal to their targets.
    rounds : int
        Number of rounds in which an order changed.

    Examples
    --------
    >>> alignment = UnitAlignment(np.array([[1, 0]]), np.ones((1, 2)), 0.5, 1.0, 1)
    >>> up = np.array([[[1.0], [2.0]]])
    >>> alignment.apply(up)[0]
    array([[[2.],
            [1.]]])
    """

    permutations: np.ndarray = field(repr=False)
    scales: np.ndarray = field(repr=False)
    before: float
    after: float
    rounds: int

    def apply(
        self, up: Array, down: Array | None = None, gate: Array | None = None
    ) -> tuple[Array, ...]:
        """Put the units of matrices into the common order; no function changes.

        Parameters
        ----------
        up : array, shape (E, F, H)
            NumPy array or torch tensor.
        down : array, shape (E, H, F), optional
        gate : array, shape (E, F, H), optional
            Its rows keep their scale.

        Returns
        -------
        tuple of array
            Copies of the given matrices.

        Raises
        ------
        InputError
            If a matrix is not one of E networks with F units.
        """
        count, units = self.permutations.shape
        for name, matrix, axis in (("up", up, 1), ("down", down, 2), ("gate", gate, 1)):
            if matrix is None:
                continue
            if matrix.ndim != 3 or (matrix.shape[0], matrix.shape[axis]) != (count, units):
                raise InputError(
                    f"{name} must have E={count} and F={units} as the alignment, got an array "
                    f"of shape {tuple(matrix.shape)}"
                )
        experts = np.arange(len(self.permutations))[:, None]
        xp = get_backend(up)
        scales = xp.from_numpy(self.scales[..., None], like=up)
        aligned = [up[experts, self.permutations] * scales]
        if down is not None:
            columns = xp.transpose(down)[experts, self.permutations] / scales
            aligned.append(xp.transpose(columns))
        if gate is not None:
            aligned.append(gate[experts, self.permutations])
        return tuple(aligned)


def align_hidden_units(
    up: Array,
    down: Array,
    gate: Array | None = None,
    *,
    rescale: bool = False,
    toward: Sequence[Array] | None = None,
    max_rounds: int = 10,
) -> UnitAlignment:
    """Find the order of hidden units in which several networks resemble each other most.

    A network down · act(up · x) keeps its function if its hidden units change places. Networks that
    were trained apart therefore look less alike than they are, and share less in a joint
    decomposition. Every network in turn gets the order that brings its units nearest to their mean
    over all networks, until no order changes (Ainsworth et al., arXiv:2209.04836, section 3.2, for
    several networks; the assignment problems are solved exactly).

    Parameters
    ----------
    up : array, shape (E, F, H)
        Matrices into the hidden units, of any supported library.
    down : array, shape (E, H, F)
        Matrices out of the hidden units.
    gate : array, shape (E, F, H), optional
        Matrices of the gates.
    rescale : bool
        Also give the rows of ``up`` and the columns of ``down`` the same norm, unit by unit. That
        keeps the function if the activation is positively homogeneous (ReLU, leaky ReLU), and that
        of every gated network, where ``up`` meets no activation.
    toward : sequence of 2 or 3 array, optional
        Targets with the shapes of ``up``, ``down`` and ``gate``: what a joint decomposition made of
        the networks, say. Every network gets the order that brings it nearest to its own target.
    max_rounds : int
        Largest number of rounds over all networks.

    Returns
    -------
    UnitAlignment
        With the given order if no other order brings the networks nearer to their mean or targets.

    Raises
    ------
    InputError
        If the matrices do not belong to the same networks, or hold NaN or infinity; if there are
        targets and ``rescale``.

    See Also
    --------
    decompose_aligned : Take turns with a joint decomposition.

    Notes
    -----
    Up, down and gate count alike: each is divided by its norm over all networks, or, with targets,
    network by network, as :func:`decompose_shared` does. A round solves E
    assignment problems of F units, which takes O(E·F²·(H + F)) operations.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> up, down = rng.normal(size=(8, 5)), rng.normal(size=(5, 8))
    >>> orders = [rng.permutation(8) for _ in range(3)]
    >>> ups = np.stack([up[order] for order in orders])
    >>> downs = np.stack([down[:, order] for order in orders])
    >>> alignment = align_hidden_units(ups, downs)
    >>> ups, downs = alignment.apply(ups, downs)
    >>> bool((ups == ups[0]).all() and (downs == downs[0]).all())
    True
    """
    matrices = _checked(up, down, gate)
    rescale = check_bool("rescale", rescale)
    max_rounds = check_positive_int("max_rounds", max_rounds)
    if toward is not None:
        if rescale:
            raise InputError("rescale=True moves the networks away from targets: got toward, too")
        return _align_to(
            matrices, _targets(toward, [up, down] if gate is None else [up, down, gate])
        )
    experts, units = matrices[0].shape[:2]
    scales = _balancing(matrices[0], matrices[1]) if rescale else np.ones((experts, units))
    features = _features([matrices[0] * scales[..., None], matrices[1] / scales[..., None]])
    if gate is not None:
        features = np.concatenate([features, _features(matrices[2:])], axis=2)
    before = _explained(_features(matrices))
    best = np.tile(np.arange(units), (experts, 1)), before, 0
    # From the mean over those networks that have an order already, or over all as they are given.
    for known in (1, experts):
        orders, rounds = _orders(features, max_rounds, known)
        after = _explained(np.take_along_axis(features, orders[..., None], axis=1))
        if after > best[1] + _ROUNDING:
            best = orders, after, rounds
    orders, after, rounds = best
    if after == before:
        scales = np.ones((experts, units))
    return UnitAlignment(orders, np.take_along_axis(scales, orders, axis=1), before, after, rounds)


def alignment_of(matrices: Sequence[Array], orders: np.ndarray, rounds: int = 0) -> UnitAlignment:
    """Return an order, (E, F), of the units of ``up``, ``down`` and perhaps ``gate``."""
    features = _features(_checked(matrices[0], matrices[1], *matrices[2:] or [None]))
    after = _explained(np.take_along_axis(features, orders[..., None], axis=1))
    return UnitAlignment(orders, np.ones(orders.shape), _explained(features), after, rounds)


def _checked(up: Array, down: Array, gate: Array | None) -> list[np.ndarray]:
    """Return the matrices in double precision, all with shape (E, F, H)."""
    arrays = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    matrices = {}
    for name, array in arrays.items():
        matrix = np.asarray(get_backend(array).to_numpy(array))
        if matrix.ndim != 3 or 0 in matrix.shape:
            raise InputError(f"{name} must have three axes, got an array of shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise InputError(f"{name} contains NaN or infinity")
        wide = np.result_type(matrix.dtype, np.float64)
        matrix = matrix.astype(wide)
        matrices[name] = matrix.transpose(0, 2, 1) if name == "down" else matrix
    size = matrices["up"].shape
    for name, matrix in matrices.items():
        if matrix.shape[:2] != size[:2]:
            expected = "(E, H, F)" if name == "down" else "(E, F, H)"
            raise InputError(
                f"{name} must have shape {expected} with E={size[0]} and F={size[1]} as up has "
                f"them, got {tuple(arrays[name].shape)}"
            )
    return list(matrices.values())


def _targets(toward: Sequence[Array], given: Sequence[Array]) -> list[np.ndarray]:
    """Return targets in double precision, all with shape (E, F, H)."""
    if len(toward) != len(given):
        raise InputError(f"toward must hold {len(given)} arrays, one per matrix, got {len(toward)}")
    for name, target, matrix in zip(("up", "down", "gate"), toward, given, strict=False):
        if tuple(target.shape) != tuple(matrix.shape):
            raise InputError(
                f"the target of {name} must have its shape {tuple(matrix.shape)}, got "
                f"{tuple(target.shape)}"
            )
    return _checked(toward[0], toward[1], toward[2] if len(toward) == 3 else None)


def _align_to(matrices: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> UnitAlignment:
    """Give every network the order that brings it nearest to its target."""
    norms = [np.linalg.norm(each, axis=(1, 2), keepdims=True) for each in matrices]
    norms = [np.where(norm > 0, norm, 1.0) for norm in norms]
    features, wanted = (
        np.concatenate([each / norm for each, norm in zip(group, norms, strict=True)], axis=2)
        for group in (matrices, targets)
    )
    given = np.arange(features.shape[1])
    orders = np.stack([best_order(*pair, given) for pair in zip(wanted, features, strict=True)])
    aligned = np.take_along_axis(features, orders[..., None], axis=1)
    total = np.linalg.norm(features) ** 2 or 1.0
    before, after = (1 - np.linalg.norm(each - wanted) ** 2 / total for each in (features, aligned))
    changed = int((orders != given).any())
    return UnitAlignment(orders, np.ones(orders.shape), float(before), float(after), changed)


def best_order(target: np.ndarray, units: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the order of units, (F, H), that is nearest to a target; the present one if none is.

    It solves a linear assignment problem.
    """
    # The module takes as long to import as the whole of tnmoe.
    from scipy.optimize import linear_sum_assignment

    similarity = (target @ units.conj().T).real
    order = linear_sum_assignment(similarity, maximize=True)[1]
    rows = np.arange(len(order))
    is_better = similarity[rows, order].sum() > similarity[rows, present].sum()
    return order if is_better else present


def _balancing(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return the factors that make the rows of ``up`` as long as those of ``down``; 1 for zeros."""
    rows, columns = np.linalg.norm(up, axis=2), np.linalg.norm(down, axis=2)
    known = (rows > 0) & (columns > 0)
    return np.sqrt(np.where(known, columns, 1) / np.where(known, rows, 1))


def _features(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Join matrices (E, F, …), each divided by its norm."""
    norms = [np.linalg.norm(matrix) or 1.0 for matrix in matrices]
    return np.concatenate([each / norm for each, norm in zip(matrices, norms, strict=True)], axis=2)


def _orders(features: np.ndarray, max_rounds: int, known: int) -> tuple[np.ndarray, int]:
    """Return the order of every network's units, and the number of rounds that changed one.

    The mean begins with the first ``known`` networks. The others join it when they have an order.
    """
    experts, units = features.shape[:2]
    orders = np.tile(np.arange(units), (experts, 1))
    total, rounds = features[:known].sum(0), 0
    for number in range(max_rounds):
        changed = False
        for expert in range(experts):
            is_known = number > 0 or expert < known
            rest = total - features[expert][orders[expert]] if is_known else total
            order = best_order(rest, features[expert], orders[expert])
            if (order != orders[expert]).any():
                changed, orders[expert] = True, order
            total = rest + features[expert][orders[expert]]
        if not changed:
            break
        rounds = number + 1
    return orders, rounds


def _explained(features: np.ndarray) -> float:
    """Return the share of the squared norm that the mean over the networks explains."""
    total = np.linalg.norm(features) ** 2
    return float(len(features) * np.linalg.norm(features.mean(0)) ** 2 / total) if total else 1.0
