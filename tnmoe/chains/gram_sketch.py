"""A Gram matrix that is known only by its products with some vectors, from one pass over blocks.

For an unfolding M of T columns, too large for memory, and a basis Q of k vectors the pass sums up
Z = G Q with G = Mᴴ M. Nyström's approximation Z (Qᴴ Z)⁻¹ Zᴴ = F Fᴴ of G takes k · T numbers, where
G itself takes T². G − F Fᴴ has no negative eigenvalue. So for every right isometry E (T columns)
‖M − M Eᴴ E‖² ≤ ‖M‖² − ‖F‖² + ‖Fᴴ − Fᴴ Eᴴ E‖²: what a truncation of the small Fᴴ loses bounds what
the same truncation of M loses (Tropp, Yurtsever, Udell, Cevher, NeurIPS 2017, arXiv:1706.05736).
"""

from __future__ import annotations

from math import frexp

import numpy as np

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.scaling import times_power
from tnmoe.errors import InputError

# Blocks whose entries are within this many binary orders of magnitude of 1 are not scaled.
_SAFE_EXPONENT = 30
# Eigenvalues of Qᴴ Z below this many units in the last place of the largest, per vector, are noise.
_NOISE = 4.0


class GramSketch:
    """The products of a Gram matrix Mᴴ M with a basis, summed over blocks of the rows of M.

    Everything is in double precision, and divided by powers of two, so that no square over- or
    underflows.

    Parameters
    ----------
    xp : Backend
        Library of the blocks.
    basis : array, shape (T, k)
        Orthonormal vectors.

    Attributes
    ----------
    image : array, shape (T, k)
        The products Z, divided by 4 to the power of ``exponent``.
    squared_norm : float
        ‖M‖², divided like ``image``.
    """

    def __init__(self, xp: Backend, basis: Array) -> None:
        self._xp, self._basis = xp, basis
        self.image = xp.zeros(basis.shape, like=basis)
        self._exponent: int | None = None
        self.squared_norm = 0.0

    @property
    def exponent(self) -> int:
        """The power of two that M is divided by; 0 if M is zero."""
        return self._exponent or 0

    def add(self, block: Array, name: str) -> None:
        """Take in some rows of M, a block (rows, T) in double precision.

        Raises
        ------
        InputError
            If the block holds NaN or infinity; ``name`` says which rows these are.
        """
        xp = self._xp
        largest = xp.max_abs(block)
        if not np.isfinite(largest):
            raise InputError(f"{name} contain NaN or infinity")
        if largest == 0:
            return
        exponent = frexp(largest)[1]
        exponent = 0 if abs(exponent) <= _SAFE_EXPONENT else exponent
        if self._exponent is None:
            self._exponent = exponent
        elif (shift := exponent - self._exponent) > 0:  # the sums so far are in smaller units
            self.image = times_power(self.image, -2 * shift)
            self.squared_norm *= 4.0**-shift
            self._exponent = exponent
        block = times_power(block, -self._exponent)
        self.image = self.image + xp.adjoint(block) @ (block @ self._basis)
        self.squared_norm += float(xp.to_numpy(xp.norm(block))) ** 2

    def factor(self) -> tuple[Array, float]:
        """Return Fᴴ (k, T), some rows of which may be zero, and ‖M‖² − ‖F‖²."""
        xp = self._xp
        inner = xp.adjoint(self._basis) @ self.image
        values, vectors = xp.eigh((inner + xp.adjoint(inner)) / 2)
        found = xp.to_numpy(values)
        noise = _NOISE * len(found) * EPSILON[xp.dtype_name(self._basis)] * max(found[0], 0.0)
        factors = np.where(found > noise, np.where(found > noise, found, 1.0) ** -0.5, 0.0)
        factor = xp.adjoint(self.image @ (vectors * xp.from_numpy(factors, like=values)))
        captured = float(xp.to_numpy(xp.norm(factor))) ** 2
        return factor, max(0.0, self.squared_norm - captured)
