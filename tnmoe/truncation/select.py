"""Bond dimensions of a whole MPO, chosen from the Schmidt spectra of all its bonds."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, isfinite

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON, REAL_DTYPES
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape
from tnmoe.truncation.limits import Limits
from tnmoe.truncation.spectra import entanglement_entropy, squared_tails


def select_bonds(
    spectra: Sequence[Array],
    shape: MPOShape,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
) -> tuple[int, ...]:
    """Choose the bonds with the fewest parameters for an error, or the least error for a size.

    The squares of what the bonds lose add up to a bound on the squared error of the whole
    (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2). The search weighs this
    prediction against the number of parameters over all bonds together, so it spends an error
    where that saves most. With few enough Schmidt values the choice is the best there is. With
    more than 2¹⁷ combinations of ranks at all bonds but the largest it comes from a local search;
    it is then never worse than cutting all bonds at one common error.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, of any array library, as in
        ``spectra`` of :class:`TruncationInfo`.
    shape : MPOShape
        Legs of the operator.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond. It wins over ``rtol``.
    bonds : sequence of int, optional
        Exactly these bonds. They are checked, also against the other arguments, and returned.
    rtol : float, optional
        Largest relative Frobenius error predicted for the whole.
    max_params : int, optional
        Largest number of parameters. It wins over ``rtol``.

    Returns
    -------
    tuple of int
        One dimension per bond. All can be used as a whole: ``shape.bond_dims`` keeps them.

    Raises
    ------
    InputError
        If an argument is malformed, ``max_params`` is less than bonds of 1 need, or ``bonds``
        contradict another argument.

    Examples
    --------
    >>> import numpy as np
    >>> shape = MPOShape(out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    >>> spectra = [2.0 ** -np.arange(16), 4.0 ** -np.arange(16)]
    >>> select_bonds(spectra, shape, rtol=0.01)
    (7, 4)
    >>> select_bonds(spectra, shape, max_params=500)
    (7, 3)
    """
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params)
    values = _scaled(_check_spectra(spectra, shape))
    return limits.choose_bonds([squared_tails(spectrum) for spectrum in values])


def bonds_by_entropy(
    spectra: Sequence[Array],
    shape: MPOShape,
    *,
    scale: float = 1.0,
    max_bond: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Choose bonds in proportion to the effective number of Schmidt values at each bond.

    The exponential of the entanglement entropy counts Schmidt values by their size: m equal
    values count as m, and zeros count nothing. It compares how much the bonds carry, and does not
    promise an error.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, of any array library.
    shape : MPOShape
        Legs of the operator.
    scale : float
        Positive factor for the effective numbers.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.

    Returns
    -------
    tuple of int
        Per bond: ``scale`` · exp(entropy), rounded up. No dimension exceeds the number of Schmidt
        values, ``max_bond``, or what its neighbours can use.

    Raises
    ------
    InputError
        If an argument is malformed.

    Examples
    --------
    >>> import numpy as np
    >>> shape = MPOShape(out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    >>> bonds_by_entropy([np.array([1.0, 0, 0]), np.ones(10)], shape)
    (1, 10)
    """
    if not isinstance(scale, (int, float, np.floating)) or not isfinite(scale) or scale <= 0:
        raise InputError(f"scale must be a finite number above 0, got {scale!r}")
    caps = shape.bond_dims(max_bond)
    ranks = []
    for values, cap in zip(_check_spectra(spectra, shape), caps, strict=True):
        effective = min(scale * exp(entanglement_entropy(values)), cap, len(values))
        # exp(log m) may come out a little above m, and must not count as m + 1.
        ranks.append(max(1, ceil(effective * (1 - 1e-9))))
    return shape.bond_dims(ranks)


def _check_spectra(spectra: Sequence[Array], shape: MPOShape) -> list[np.ndarray]:
    """Return the spectra as NumPy arrays; raise unless there is one per bond."""
    if len(spectra) != shape.sites - 1:
        raise InputError(
            f"spectra need one array per bond: got {len(spectra)} for {shape.sites - 1} bonds"
        )
    return [_check_spectrum(bond, spectrum) for bond, spectrum in enumerate(spectra)]


def _check_spectrum(bond: int, spectrum: Array) -> np.ndarray:
    xp = get_backend(spectrum)
    name, dtype = f"the spectrum of bond {bond}", xp.dtype_name(spectrum)
    if spectrum.ndim != 1 or 0 in spectrum.shape or dtype not in REAL_DTYPES:
        raise InputError(
            f"{name} must be a non-empty 1-D array of real floating-point numbers, got shape "
            f"{tuple(spectrum.shape)} and dtype {dtype}"
        )
    values = xp.to_numpy(xp.astype(spectrum, "float64"))
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError(f"{name} must be finite and nowhere negative")
    # Values that are equal but for rounding may come in any order.
    if (values[1:] > values[:-1] + 100 * EPSILON[dtype] * values.max()).any():
        raise InputError(f"{name} must be descending")
    return values


def _scaled(spectra: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Divide the spectra by their largest value, so that squares neither over- nor underflow."""
    largest = max((values.max() for values in spectra), default=0.0)
    with np.errstate(under="ignore"):
        return [values / largest if largest > 0 else values for values in spectra]
