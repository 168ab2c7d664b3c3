"""What a truncation reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot

from tnmoe.backends import Array


@dataclass(frozen=True)
class TruncationInfo:
    """Schmidt values of a truncated operator and what was cut of them, bond by bond.

    Attributes
    ----------
    discarded : tuple of float
        Per bond: 2-norm of the Schmidt values that were cut there. Where ``"eigh"`` cut a matrix
        in double precision the norm is measured instead; bonds that were cut together then share
        one measurement. NaN while JAX traces a function.
    spectra : tuple of array
        Per bond: the Schmidt values just before the cut, descending. They are arrays of the cores'
        library in double precision, whatever the dtype of the cores. While JAX traces a function,
        they have the precision of the cores. ``"eigh"`` computes their squares: in double precision
        all its values are at least 3e-8 of the norm, which is the rounding of these squares.
    methods : tuple of str
        Per bond: the algorithm, ``"qr"``, ``"eigh"``, ``"svd"`` or ``"randomized"``.
    earlier_error : float
        Bound on the error made before these cuts, for a sum or product that was never formed
        exactly. 0 otherwise.
    measured_error : float, or None
        With ``weights``: ‖W − MPO‖ in the Frobenius norm, measured in double precision, plus the
        rounding of the measurement. ``discarded`` and ``spectra`` are then those of the sweep over
        the whitened matrix.
    weighted_error : float, or None
        With ``weights``: the error weighed by the damped moments, relative to the matrix.

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
    measured_error: float | None = None
    weighted_error: float | None = None

    @property
    def error_bound(self) -> float:
        """Bound on ‖W − MPO‖ in the Frobenius norm: earlier_error + sqrt(Σ discarded²).

        Every cut is an orthogonal projection inside the range of the cuts before it, so the
        errors add up as squares (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2).
        The error reaches the bound unless the shape is padded, where part of what was cut may lie
        in the padding. Rounding adds a few units in the last place of ‖W‖. With ``weights`` the
        bound is the measured error.
        """
        if self.measured_error is not None:
            return self.measured_error
        return self.earlier_error + hypot(*self.discarded)
