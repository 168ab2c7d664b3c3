"""Second moments of inputs, by which errors of matrices become errors of outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import widened
from tnmoe.chains.whitening import root_of
from tnmoe.errors import InputError


@dataclass(frozen=True)
class InputMoments:
    """Second moments S of inputs, with their root, which several decompositions may use.

    Attributes
    ----------
    matrix : array, shape (in, in)
        S, Hermitian and positive definite.
    root, inverse : array, shape (in, in)
        R with S = R Rᴴ, in double precision, and R⁻¹.
    """

    matrix: Array = field(repr=False)
    root: Array = field(repr=False)
    inverse: Array = field(repr=False)

    @classmethod
    def of(cls, matrix: Array) -> InputMoments:
        """Find the root of second moments.

        Parameters
        ----------
        matrix : array, shape (in, in)
        """
        xp = get_backend(matrix)
        with xp.full_precision(matrix):
            root, inverse = root_of(xp, widened(xp, matrix)[None])
        return cls(matrix, root[0], inverse[0])

    def check(self, matrices: Array) -> None:
        """Raise an InputError if matrices (E, out, in) have another number of inputs."""
        size = int(matrices.shape[2])
        if tuple(self.matrix.shape) != (size, size):
            raise InputError(
                f"moments must have shape {(size, size)}, got {tuple(self.matrix.shape)}"
            )
