"""Second moments of inputs, by which errors of matrices become errors of outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import COMPLEX_DTYPES
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import widened
from tnmoe.chains.whitening import root_of
from tnmoe.errors import InputError


@dataclass(frozen=True)
class InputMoments:
    """Second moments S of inputs: one matrix for all experts, or one for each.

    Attributes
    ----------
    matrices : array, shape (1, in, in) or (E, in, in)
        Hermitian and positive. Moments of zeros, of an expert without inputs, count as the
        identity.
    damping : float or None
        Share of the identity in the moments, whose mean eigenvalue over all experts becomes 1; None
        for moments as they are. It is added to one expert's at a time.

    Examples
    --------
    >>> import numpy as np
    >>> moments = InputMoments.of(np.array([[4.0, 2.0], [2.0, 2.0]]))
    >>> root, inverse = moments.root()
    >>> root.tolist(), inverse.tolist()
    ([[2.0, 0.0], [1.0, 1.0]], [[0.5, 0.0], [-0.5, 1.0]])
    """

    matrices: Array = field(repr=False)
    damping: float | None = None

    @classmethod
    def of(cls, matrices: Array, damping: float | None = None) -> InputMoments:
        """Take second moments, of all experts together or of each.

        Parameters
        ----------
        matrices : array, shape (in, in) or (E, in, in)
        damping : float, optional
            Share of the identity, from 0 to 1.

        Raises
        ------
        InputError
            If the matrices are not square.
        """
        *experts, rows, columns = (1, 1, *matrices.shape)[-3:]
        if matrices.ndim not in (2, 3) or rows != columns:
            raise InputError(
                f"moments must have shape (in, in) or (E, in, in), got {tuple(matrices.shape)}"
            )
        return cls(matrices.reshape(*experts, rows, columns), damping)

    @property
    def are_common(self) -> bool:
        """Whether one matrix is for all experts."""
        return int(self.matrices.shape[0]) == 1

    def of_expert(self, expert: int = 0) -> Array:
        """Return the moments of an expert, (in, in), in double precision."""
        xp, chosen = get_backend(self.matrices), self.matrices[0 if self.are_common else expert]
        wide = widened(xp, chosen)
        identity = xp.eye(wide.shape[0], like=wide)
        if self.damping is not None:
            wide = wide * ((1 - self.damping) / self._mean) + identity * self.damping
        return wide if xp.max_abs(wide) else identity

    @cached_property
    def _mean(self) -> float:
        """Mean eigenvalue of all experts' moments; 1 if all are zeros."""
        xp, (experts, size, _) = get_backend(self.matrices), map(int, self.matrices.shape)
        traces = (xp.trace(widened(xp, each), 0, 1).real for each in self.matrices)
        return sum(number_of(xp, trace) for trace in traces) / (experts * size) or 1.0

    def root(self, expert: int = 0) -> tuple[Array, Array]:
        """Return R with S = R·Rᴴ, and R⁻¹, for an expert, in double precision.

        Returns
        -------
        tuple of array, shapes (in, in)

        Notes
        -----
        R is the Cholesky factor. Only moments that are singular to rounding need an
        eigendecomposition, which takes many times as long: it raises small eigenvalues to rounding.
        """
        return self._common_root if self.are_common else self._root(expert)

    @cached_property
    def _common_root(self) -> tuple[Array, Array]:
        # Several decompositions use it.
        return self._root(0)

    def _root(self, expert: int) -> tuple[Array, Array]:
        xp, moments = get_backend(self.matrices), self.of_expert(expert)
        with xp.full_precision(moments):
            found = xp.cholesky(moments)
            if found is not None:
                return found
            root, inverse = root_of(xp, moments[None])
        return root[0], inverse[0]

    def check(self, matrices: Array, *, common: bool = False) -> None:
        """Raise an InputError if these are not moments of the inputs of matrices (E, out, in).

        Parameters
        ----------
        matrices : array, shape (E, out, in)
        common : bool
            Whether one matrix has to be for all experts.
        """
        xp, (experts, _, size) = get_backend(matrices), map(int, matrices.shape)
        allowed = [(size, size)] if common else [(size, size), (experts, size, size)]
        shape = tuple(self.matrices.shape)[1 if self.are_common else 0 :]
        if shape not in allowed:
            raise InputError(
                f"moments must have shape {' or '.join(map(str, allowed))}, got {shape}"
            )
        given = xp.dtype_name(self.matrices)
        if given in COMPLEX_DTYPES and xp.dtype_name(matrices) not in COMPLEX_DTYPES:
            raise InputError(f"the moments of real matrices must be real, got {given}")
