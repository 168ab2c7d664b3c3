"""Alternating least squares for the chains of experts that share some cores.

Every array here has an axis of experts in front: of size E, or of size 1 for what all experts have
in common. Products of arrays broadcast over it, so no step loops over experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.moments import Moments, inner_product, number_of

# Steps of conjugate gradients: for a shared core that stands between cores of experts, and for any
# core beside moments.
_MOST_STEPS = 20
_WEIGHTED_STEPS = 6


@dataclass(frozen=True)
class SharedFit:
    """Chains that were fitted to targets.

    Attributes
    ----------
    cores : list of array, shapes (E, D, leg, D') or (1, D, leg, D')
    errors : list of float
        Relative error of all experts together, at the start and after every sweep.
    converged : bool
        Whether the last sweep changed the error by less than the tolerance.
    """

    cores: list[Array]
    errors: list[float]
    converged: bool

    @property
    def error(self) -> float:
        """The last error, which is that of the cores and the smallest."""
        return self.errors[-1]


def fit_shared(
    xp: Backend,
    targets: Array,
    cores: Sequence[Array],
    max_sweeps: int,
    tol: float,
    moments: Moments | None = None,
) -> SharedFit:
    """Fit chains to the targets of all experts, from given chains on.

    A sweep replaces each core by the best one beside the others. A core that an expert owns solves
    the normal equations G_L · A · G_R = V of this expert, a shared core their sum over the experts.
    G_L and G_R are the Gram matrices of the cores on either side, and V is the target contracted
    with these cores (alternating least squares for tensor trains: Holtz, Rohwedder, Schneider,
    SIAM J. Sci. Comput. 34, A683 (2012)).

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    targets : array, shape (E, product of the legs)
        Legs in the order of the sites.
    cores : sequence of array, shapes (E, D, leg, D') or (1, D, leg, D')
        Cores of experts, or shared ones.
    max_sweeps : int
        Largest number of sweeps.
    tol : float
        Stop when a sweep changes the relative error by less than this.
    moments : Moments, optional
        Weigh errors by them. Conjugate gradients solve the equations then, from the present cores.

    Notes
    -----
    A sweep costs about 8·Σ D·N operations, where N is the number of entries of all targets and the
    sum runs over the bonds: the chain right of every bond, its product with the targets, the
    targets' product with the chain left of it, and the error. With moments, every step of conjugate
    gradients costs 4·D·N + N·in operations besides.
    """
    norm = _size(xp, targets, moments)
    if not norm:
        return SharedFit(list(cores), [0.0], True)
    best, errors = list(cores), [_size(xp, targets - product_of(cores), moments) / norm]
    for _ in range(max_sweeps):
        cores = _sweep(xp, targets, best, moments)
        error = _size(xp, targets - product_of(cores), moments) / norm
        # Only rounding can raise the error: nothing is left to gain.
        if not error < errors[-1]:
            return SharedFit(best, errors, True)
        best, gain = cores, errors[-1] - error
        errors.append(error)
        if gain < tol:
            return SharedFit(best, errors, True)
    return SharedFit(best, errors, False)


def _sweep(
    xp: Backend, targets: Array, cores: Sequence[Array], moments: Moments | None
) -> list[Array]:
    """Replace all cores from left to right."""
    cores = _to_the_left(xp, cores)
    rights, right_grams = _right_parts(xp, cores)
    experts, one = targets.shape[0], xp.eye(1, like=cores[0])[None]
    left, left_gram = one, one
    state = targets if moments is None else moments.apply(targets)
    for site, right in enumerate(rights):
        _, bond, leg, after = cores[site].shape
        state = state.reshape(experts, bond * leg, -1)
        projected = (state @ xp.adjoint(right)).reshape(experts, bond, leg, after)
        is_owned = cores[site].shape[0] == experts
        equations = _Equations(xp, left_gram, right_grams[site], experts, is_owned)
        if moments is None:
            cores[site] = equations.solve(projected, cores[site])
        else:
            apply = partial(_weighted, xp, left, right, moments)
            cores[site] = equations.solve_weighted(apply, projected, cores[site])
        if site + 1 == len(cores):
            break
        cores[site], cores[site + 1] = _move_right(xp, cores[site], cores[site + 1])
        matrix = cores[site].reshape(-1, bond * leg, cores[site].shape[3])
        state = xp.adjoint(matrix) @ state
        passed = left_gram @ cores[site].reshape(-1, bond, leg * matrix.shape[2])
        left_gram = xp.adjoint(matrix) @ passed.reshape(-1, bond * leg, matrix.shape[2])
        if moments is not None:
            longer = left @ cores[site].reshape(-1, bond, leg * matrix.shape[2])
            left = longer.reshape(-1, left.shape[1] * leg, matrix.shape[2])
    return cores


def _weighted(xp: Backend, left: Array, right: Array, moments: Moments, core: Array) -> Array:
    """Build chains around a core, multiply them by the moments, and project them onto the core."""
    experts, bond, leg, after = core.shape
    rows = (left @ core.reshape(experts, bond, leg * after)).reshape(-1, left.shape[1] * leg, after)
    chains = rows @ right
    chains = moments.apply(chains.reshape(chains.shape[0], -1))
    rows = chains.reshape(chains.shape[0], left.shape[1] * leg, -1) @ xp.adjoint(right)
    rows = rows.reshape(rows.shape[0], left.shape[1], leg * after)
    return (xp.adjoint(left) @ rows).reshape(-1, bond, leg, after)


def _size(xp: Backend, targets: Array, moments: Moments | None) -> float:
    """Return the norm of all experts' matrices together, weighed by the moments."""
    if moments is None:
        return number_of(xp, xp.norm(targets))
    return max(0.0, inner_product(xp, targets, moments.apply(targets))) ** 0.5


def product_of(cores: Sequence[Array]) -> Array:
    """Multiply all cores: (E, legs in the order of the sites)."""
    product = cores[0][:, 0]
    for core in cores[1:]:
        _, bond, leg, after = core.shape
        product = product.reshape(product.shape[0], -1, bond) @ core.reshape(-1, bond, leg * after)
    return product.reshape(product.shape[0], -1)


def _to_the_left(xp: Backend, cores: Sequence[Array]) -> list[Array]:
    """Give all cores but the first orthonormal rows, for every expert or for all together."""
    cores = list(cores)
    for site in range(len(cores) - 1, 0, -1):
        core, before = cores[site], cores[site - 1]
        experts, bond, leg, after = core.shape
        own = experts == before.shape[0]
        # Experts that own both cores have a gauge each; otherwise there is one for all of them.
        rows = core.reshape(experts, bond, leg * after)
        if not own:
            rows = xp.permute(rows, (1, 0, 2)).reshape(1, bond, experts * leg * after)
        isometry, factor = xp.qr(xp.adjoint(rows))
        rows, factor = xp.adjoint(isometry), xp.adjoint(factor)
        if not own:
            rows = xp.permute(rows.reshape(-1, experts, leg * after), (1, 0, 2))
        cores[site] = rows.reshape(experts, -1, leg, after)
        matrix = before.reshape(before.shape[0], -1, bond) @ factor
        cores[site - 1] = matrix.reshape(*before.shape[:3], -1)
    return cores


def _move_right(xp: Backend, core: Array, following: Array) -> tuple[Array, Array]:
    """Give a core orthonormal columns, for every expert or for all together."""
    experts, bond, leg, after = core.shape
    own = experts == following.shape[0]
    columns = core.reshape(experts if own else 1, -1, after)
    isometry, factor = xp.qr(columns)
    count, _, *legs = following.shape
    moved = factor @ following.reshape(count, after, prod(legs))
    return (
        isometry.reshape(experts, bond, leg, -1),
        moved.reshape(count, -1, *legs),
    )


def _right_parts(xp: Backend, cores: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return, for every site, the chain right of it, (e, D, legs), and its Gram matrix."""
    rights = [xp.eye(1, like=cores[0])[None]]
    grams = [rights[0]]
    for core in cores[:0:-1]:
        _, bond, leg, after = core.shape
        rows = core.reshape(-1, bond * leg, after)
        rights.append((rows @ rights[-1]).reshape(-1, bond, leg * rights[-1].shape[2]))
        passed = (rows @ grams[-1]).reshape(-1, bond, leg * after)
        grams.append(passed @ xp.adjoint(core.reshape(-1, bond, leg * after)))
    return rights[::-1], grams[::-1]


@dataclass(frozen=True)
class _Equations:
    """The normal equations G_L · A · G_R = V of a core A, (D, leg, D').

    Every expert that owns the core has its own equations. A shared core solves their sum.
    """

    xp: Backend
    left: Array
    right: Array
    experts: int
    is_owned: bool

    def solve(self, projected: Array, start: Array) -> Array:
        """Solve the equations; ``projected`` is V of every expert."""
        if self.is_owned or 1 in (self.left.shape[0], self.right.shape[0]):
            return self._roughly(self._added(projected))
        # The sum over the experts does not factorise.
        apply = partial(_between, self.left, right=self.right)
        return self._descend(apply, projected, start, _MOST_STEPS)

    def solve_weighted(
        self, apply: Callable[[Array], Array], projected: Array, start: Array
    ) -> Array:
        """Solve other equations, of which ``apply`` is the left side."""
        return self._descend(apply, projected, start, _WEIGHTED_STEPS)

    def _roughly(self, projected: Array) -> Array:
        """Solve the equations, or those with the mean Gram matrices of the experts."""
        if self.is_owned:
            left, right, same = self.left, self.right, 1
        else:
            left, right, same = self._total(self.left), self._total(self.right), self.experts
        inverses = inverse(self.xp, left), inverse(self.xp, right)
        return _between(inverses[0], projected, inverses[1]) * float(same)

    def _added(self, cores: Array) -> Array:
        return cores if self.is_owned else self._total(cores)

    def _descend(
        self, apply: Callable[[Array], Array], projected: Array, start: Array, steps: int
    ) -> Array:
        """Solve by conjugate gradients, whose every step lowers the error."""
        xp, target = self.xp, self._added(projected)
        solution, residual = start, target - self._added(apply(start))
        least = EPSILON[xp.dtype_name(target)] ** 2 * self._products(target, target)
        direction, slopes = None, np.ones(1)
        for _ in range(steps):
            ahead = self._roughly(residual)
            new = self._products(residual, ahead)
            goes_on = new > least
            if not goes_on.any():
                break
            # Experts that are done stand still.
            new = np.where(goes_on, new, 0.0)
            direction = ahead if direction is None else ahead + direction * self._of(new / slopes)
            slopes, image = np.where(goes_on, new, 1.0), self._added(apply(direction))
            curvatures = self._products(direction, image)
            rises = curvatures > 0
            steps_ahead = self._of(np.where(rises, new, 0.0) / np.where(rises, curvatures, 1.0))
            solution = solution + direction * steps_ahead
            residual = residual - image * steps_ahead
        return solution

    def _products(self, first: Array, second: Array) -> np.ndarray:
        """Return inner products for every expert that owns the core, or the one of a shared core.

        They are constants for gradients.
        """
        count = first.shape[0]
        rows, columns = first.reshape(count, 1, -1), second.reshape(count, -1, 1)
        return self.xp.to_numpy((self.xp.conj(rows) @ columns).real).astype(float)[..., None]

    def _of(self, numbers: np.ndarray) -> Array:
        """Turn numbers of :meth:`_products` into factors of cores."""
        return self.xp.from_numpy(numbers, like=self.left)

    def _total(self, arrays: Array) -> Array:
        """Sum over the experts; what is the same for all of them counts E times."""
        count, *shape = arrays.shape
        if count == 1:
            return arrays * float(self.experts)
        ones = self.xp.zeros((1, count), like=arrays) + 1.0
        return (ones @ arrays.reshape(count, prod(shape))).reshape(1, *shape)


def _between(left: Array, core: Array, right: Array) -> Array:
    """Multiply cores (e, D, leg, D') by matrices of both bonds."""
    experts, bond, leg, after = core.shape
    product = left @ core.reshape(experts, bond, leg * after)
    product = product.reshape(-1, bond * leg, after) @ right
    return product.reshape(-1, bond, leg, after)


def inverse(xp: Backend, gram: Array) -> Array:
    """Return the pseudo-inverse of Gram matrices, (e, D, D)."""
    values, vectors, kept = _spectrum(xp, gram)
    return (vectors * (kept / values)[..., None, :]) @ xp.adjoint(vectors)


def inverse_root(xp: Backend, gram: Array) -> Array:
    """Return the square root of the pseudo-inverse of Gram matrices, (e, D, D)."""
    values, vectors, kept = _spectrum(xp, gram)
    return (vectors * (kept / values**0.5)[..., None, :]) @ xp.adjoint(vectors)


def _spectrum(xp: Backend, gram: Array) -> tuple[Array, Array, Array]:
    """Return positive eigenvalues, eigenvectors, and the share of every eigenvector that counts.

    The share falls to zero smoothly where an eigenvalue is within the rounding of the matrix.
    """
    values, vectors = xp.eigh(gram)
    floor = 8 * gram.shape[-1] * EPSILON[xp.dtype_name(gram)]
    # The Gram matrix of an expert without numbers is zero.
    largest = values[..., :1].clip(1e-30)
    relative = (values / largest).clip(floor)
    return relative * largest, vectors, -((relative / floor) ** -4) + 1.0
