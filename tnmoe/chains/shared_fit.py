"""Alternating least squares for the chains of experts that share some cores.

Every array here has an axis of experts in front: of size E, or of size 1 for what all experts have
in common. Products of arrays broadcast over it, so no step loops over experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON

# Steps of conjugate gradients for a shared core that stands between cores of experts.
_MOST_STEPS = 20


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
    xp: Backend, targets: Array, cores: Sequence[Array], max_sweeps: int, tol: float
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

    Notes
    -----
    A sweep costs about 8·Σ D·N operations, where N is the number of entries of all targets and the
    sum runs over the bonds: the chain right of every bond, its product with the targets, the
    targets' product with the chain left of it, and the error.
    """
    norm = _number(xp, xp.norm(targets))
    if not norm:
        return SharedFit(list(cores), [0.0], True)
    best, errors = list(cores), [_missed(xp, targets, cores) / norm]
    for _ in range(max_sweeps):
        cores = _sweep(xp, targets, best)
        error = _missed(xp, targets, cores) / norm
        # Only rounding can raise the error: nothing is left to gain.
        if not error < errors[-1]:
            return SharedFit(best, errors, True)
        best, gain = cores, errors[-1] - error
        errors.append(error)
        if gain < tol:
            return SharedFit(best, errors, True)
    return SharedFit(best, errors, False)


def _sweep(xp: Backend, targets: Array, cores: Sequence[Array]) -> list[Array]:
    """Replace all cores from left to right."""
    cores = _to_the_left(xp, cores)
    rights, right_grams = _right_parts(xp, cores)
    experts = targets.shape[0]
    left_gram = xp.eye(1, like=cores[0])[None]
    state = targets
    for site, right in enumerate(rights):
        _, bond, leg, after = cores[site].shape
        state = state.reshape(experts, bond * leg, -1)
        env = (state @ xp.adjoint(right)).reshape(experts, bond, leg, after)
        equations = _Equations(xp, left_gram, right_grams[site], experts)
        if cores[site].shape[0] == experts:
            cores[site] = equations.solve_each(env)
        else:
            env = equations.total(env)
            cores[site] = equations.solve_sum(env, cores[site])
        if site + 1 == len(cores):
            break
        cores[site], cores[site + 1] = _move_right(xp, cores[site], cores[site + 1])
        matrix = cores[site].reshape(-1, bond * leg, cores[site].shape[3])
        state = xp.adjoint(matrix) @ state
        passed = (left_gram @ cores[site].reshape(-1, bond, leg * matrix.shape[2])).reshape(
            -1, bond * leg, matrix.shape[2]
        )
        left_gram = xp.adjoint(matrix) @ passed
    return cores


def _missed(xp: Backend, targets: Array, cores: Sequence[Array]) -> float:
    """Return the Frobenius norm of what the chains miss of the targets."""
    product = cores[0][:, 0]
    for core in cores[1:]:
        _, bond, leg, after = core.shape
        product = product.reshape(product.shape[0], -1, bond) @ core.reshape(-1, bond, leg * after)
    return _number(xp, xp.norm(targets - product.reshape(product.shape[0], -1)))


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
    """The normal equations G_L · A · G_R = V of a core A, (D, leg, D'), for all experts."""

    xp: Backend
    left: Array
    right: Array
    experts: int

    def solve_each(self, env: Array) -> Array:
        """Solve the equations of every expert."""
        return _between(_inverse(self.xp, self.left), env, _inverse(self.xp, self.right))

    def solve_sum(self, env: Array, start: Array) -> Array:
        """Solve the sum of the equations of all experts."""
        if self.left.shape[0] > 1 and self.right.shape[0] > 1:
            return self._descend(env, start)
        left, right = self.total(self.left), self.total(self.right)
        # One of the two is the same for all experts, and has been added up, too.
        same = self.experts if 1 in (self.left.shape[0], self.right.shape[0]) else 1
        return _between(_inverse(self.xp, left), env, _inverse(self.xp, right)) * float(same)

    def _descend(self, env: Array, start: Array) -> Array:
        """Solve by conjugate gradients, whose every step lowers the error."""
        left, right = (_inverse(self.xp, self.total(gram)) for gram in (self.left, self.right))
        solution, residual = start, env - self._apply(start)
        least = (EPSILON[self.xp.dtype_name(env)] * _number(self.xp, self.xp.norm(env))) ** 2
        direction, slope = None, 0.0
        for _ in range(_MOST_STEPS):
            ahead = _between(left, residual, right) * float(self.experts)
            new = self._inner(residual, ahead)
            if new <= least:
                break
            direction = ahead if direction is None else ahead + direction * (new / slope)
            slope, image = new, self._apply(direction)
            step = new / self._inner(direction, image)
            solution, residual = solution + direction * step, residual - image * step
        return solution

    def _apply(self, core: Array) -> Array:
        """Return Σ_e G_L · A · G_R."""
        return self.total(_between(self.left, core, self.right))

    def total(self, arrays: Array) -> Array:
        """Sum over the experts; what is the same for all of them counts E times."""
        count, *shape = arrays.shape
        if count == 1:
            return arrays * float(self.experts)
        ones = self.xp.zeros((1, count), like=arrays) + 1.0
        return (ones @ arrays.reshape(count, prod(shape))).reshape(1, *shape)

    def _inner(self, first: Array, second: Array) -> float:
        row, column = self.xp.conj(first).reshape(1, -1), second.reshape(-1, 1)
        return _number(self.xp, (row @ column)[0, 0].real)


def _between(left: Array, core: Array, right: Array) -> Array:
    """Multiply cores (e, D, leg, D') by matrices of both bonds."""
    experts, bond, leg, after = core.shape
    product = left @ core.reshape(experts, bond, leg * after)
    product = product.reshape(-1, bond * leg, after) @ right
    return product.reshape(-1, bond, leg, after)


def _inverse(xp: Backend, gram: Array) -> Array:
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


def _number(xp: Backend, array: Array) -> float:
    return float(xp.to_numpy(array))
