"""What a caller may ask of a truncation, and what a truncation reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot

from tnmoe.backends import Array
from tnmoe.errors import InputError, number_in, shown


@dataclass(frozen=True)
class TruncationInfo:
    """What a truncation saw and cut, bond by bond.

    Attributes
    ----------
    discarded : tuple of float
        Per bond: 2-norm of the Schmidt values cut there. Where ``"eigh"`` cut a matrix in double
        precision it is measured, for bonds that were cut together as a share of the whole.
    spectra : tuple of array
        Per bond: the Schmidt values seen when the bond was cut, descending, before cutting; arrays
        of the cores' library in double precision, whatever the dtype of the cores. ``"eigh"`` sees
        squares: in double precision its values are no smaller than 3e-8 of the norm, which is the
        rounding of these squares.
    methods : tuple of str
        Per bond: the algorithm used (``"qr"``, ``"eigh"``, ``"svd"`` or ``"randomized"``).
    earlier_error : float
        Bound on the error made before these cuts, where what was cut was itself an approximation:
        a sum or product that was never formed exactly. 0 otherwise.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, decompose
    >>> shape = MPOShape((2, 2), (2, 2))
    >>> mpo, info = decompose(np.diag([4.0, 3, 2, 1]), shape, max_bond=1, return_info=True)
    >>> np.round(info.spectra[0], 3)
    array([5.465, 0.366, 0.   , 0.   ])
    >>> bool(np.isclose(info.error_bound, np.linalg.norm(info.spectra[0][1:])))
    True
    """

    discarded: tuple[float, ...]
    spectra: tuple[Array, ...] = field(repr=False)
    methods: tuple[str, ...]
    earlier_error: float = 0.0

    @property
    def error_bound(self) -> float:
        """Bound on ‖W − MPO‖ in the Frobenius norm: earlier_error + sqrt(Σ discarded²).

        Every cut is an orthogonal projection inside the range of the ones before it, so the
        errors add up as squares (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2).
        The bound is reached, except where the shape is padded: what was cut may lie in the
        padding. Rounding comes on top: a few units in the last place of ‖W‖.
        """
        return self.earlier_error + hypot(*self.discarded)


def check_rtol(rtol: float | None) -> float | None:
    """``rtol`` as a float or None; an InputError unless it is a finite number of at least 0."""
    try:
        return None if rtol is None else number_in("rtol", rtol, "[0, inf)")
    except InputError:
        raise InputError(f"rtol must be a finite number of at least 0, got {shown(rtol)}") from None
