"""Inputs whose second moments are the identity: errors of outputs become errors of matrices."""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.backends import Array, Backend
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import widened
from tnmoe.errors import InputError

# Smallest eigenvalue of second moments, relative to the largest, whose inverse means something.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Whitening:
    """The square root of second moments, and its inverse; both Hermitian.

    Attributes
    ----------
    root, inverse : array, shape (in, in)
        With root² = S: ‖A S^½‖ = ‖A · root‖, and A = (A · root) · inverse.
    """

    root: Array
    inverse: Array

    @classmethod
    def of(cls, xp: Backend, moments: Array, size: int) -> Whitening:
        """Return the whitening of second moments, in double precision.

        Parameters
        ----------
        xp : Backend
            Library of the moments.
        moments : array, shape (in, in)
        size : int
            Number of inputs that is expected.

        Raises
        ------
        InputError
            If the moments have another shape or no positive eigenvalue.
        """
        if tuple(moments.shape) != (size, size):
            raise InputError(f"moments must have shape {(size, size)}, got {tuple(moments.shape)}")
        values, vectors = xp.eigh(widened(xp, moments))
        largest = number_of(xp, values[0])
        if not largest > 0:
            raise InputError(f"moments must be positive, got a largest eigenvalue of {largest:.3g}")
        root = values.clip(_SMALLEST * largest) ** 0.5
        adjoint = xp.adjoint(vectors)
        return cls((vectors * root) @ adjoint, (vectors / root) @ adjoint)
