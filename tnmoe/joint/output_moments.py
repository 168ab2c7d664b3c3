"""Second moments of the outputs of experts, which say as much as those of their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import widened
from tnmoe.errors import InputError


@dataclass(frozen=True)
class OutputMoments:
    """Second moments W_e S_e W_eᴴ of the outputs of every expert, in place of its inputs' S_e.

    The best matrix of low rank is a projection of W_e onto leading eigenvectors of these moments.
    Where there are fewer outputs than inputs, they are smaller than S_e.

    Attributes
    ----------
    matrices : array, shape (E, out, out)
    scale : float
        Mean eigenvalue of all S_e, by which the moments are divided.
    damping : float
        Share of the identity in the inputs' moments: W_e W_eᴴ times this is added, for one expert
        at a time.

    Examples
    --------
    >>> import numpy as np
    >>> matrix, inputs = np.array([[1.0, 2.0]]), np.diag([3.0, 1.0])
    >>> moments = OutputMoments((matrix @ inputs @ matrix.T)[None], scale=2.0, damping=0.5)
    >>> damped = 0.5 * inputs / 2.0 + 0.5 * np.eye(2)
    >>> bool(np.allclose(moments.of_expert(0, matrix), matrix @ damped @ matrix.T))
    True
    """

    matrices: Array = field(repr=False)
    scale: float
    damping: float

    def of_expert(self, expert: int, matrix: Array) -> Array:
        """Return the moments of an expert, (out, out), in double precision.

        Parameters
        ----------
        expert : int
        matrix : array, shape (out, in)
            Its matrix W_e, in double precision.
        """
        xp = get_backend(self.matrices)
        given = widened(xp, self.matrices[expert]) * ((1 - self.damping) / (self.scale or 1.0))
        return given + matrix @ xp.adjoint(matrix) * self.damping

    def check(self, matrices: Array) -> None:
        """Raise an InputError if these are not moments of the outputs of matrices (E, out, in)."""
        experts, rows, _ = map(int, matrices.shape)
        if tuple(self.matrices.shape) != (experts, rows, rows):
            raise InputError(
                f"moments of outputs must have shape {(experts, rows, rows)}, got "
                f"{tuple(self.matrices.shape)}"
            )
