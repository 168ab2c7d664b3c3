"""Choosing the bond dimensions of a whole MPO at once, from the Schmidt spectra of its bonds."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, isfinite

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.backends.protocol import EPSILON, REAL_DTYPES
from tnmoe.errors import InputError, positive_int
from tnmoe.shapes import MPOShape
from tnmoe.truncation.info import check_rtol
from tnmoe.truncation.search import choose_bonds
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
    """Bond dimensions with the fewest parameters for an error, or the least error for a size.

    The squares of what the bonds cut add up to a bound on the squared error of the whole
    (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), theorem 2.2). This prediction and the number
    of parameters are traded against each other over all bonds together, so an error is spent
    where it saves most. Where the spectra have few enough values the choice is the best there is;
    beyond (more than 2¹⁷ combinations of all bonds but the largest) it comes from a local search,
    and is never worse than cutting all bonds at one common error.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, in any array library, as in
        ``spectra`` of :class:`TruncationInfo`.
    shape : MPOShape
        What the bonds belong to.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond. It wins over ``rtol``.
    bonds : sequence of int, optional
        Exactly these bonds: they are checked, against the other arguments too, and returned.
    rtol : float, optional
        Largest relative Frobenius error predicted for the whole.
    max_params : int, optional
        Largest number of parameters. It wins over ``rtol``.

    Returns
    -------
    tuple of int
        One dimension per bond, every one of which can be used: ``shape.bond_dims`` keeps them.

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
    caps = check_limits(shape, max_bond, bonds, rtol, max_params)
    values = _scaled(_check_spectra(spectra, shape))
    tails = [squared_tails(spectrum) for spectrum in values]
    allowed = None if rtol is None else _allowed_square(rtol, tails)
    if bonds is None:
        return choose_bonds(tails, shape, caps, allowed, max_params)
    cut = sum(tail[min(bond, len(tail) - 1)] for bond, tail in zip(caps, tails, strict=True))
    if allowed is not None and cut > allowed:
        raise InputError(f"bonds={caps} cut more than rtol={rtol} allows")
    return caps


def check_limits(
    shape: MPOShape,
    max_bond: int | Sequence[int] | None,
    bonds: Sequence[int] | None,
    rtol: float | None,
    max_params: int | None,
) -> tuple[int, ...]:
    """The largest dimension that each bond may have; ``bonds`` themselves where they are given.

    Raises
    ------
    InputError
        If an argument is out of range, or two of them contradict each other whatever the spectra.
    """
    check_rtol(rtol)
    caps = shape.bond_dims(max_bond)
    fewest = shape.num_params(1)
    if max_params is not None and positive_int("max_params", max_params) < fewest:
        raise InputError(
            f"max_params={max_params} is too few for {shape}: "
            f"with all bonds 1 it has {fewest} parameters"
        )
    if bonds is None:
        return caps
    chosen = _check_bonds(bonds, shape)
    if any(bond > cap for bond, cap in zip(chosen, caps, strict=True)):
        raise InputError(f"bonds={chosen} exceed max_bond={max_bond}")
    if max_params is not None and shape.num_params(chosen) > max_params:
        raise InputError(
            f"bonds={chosen} have {shape.num_params(chosen)} parameters, "
            f"more than max_params={max_params}"
        )
    return chosen


def bonds_by_entropy(
    spectra: Sequence[Array],
    shape: MPOShape,
    *,
    scale: float = 1.0,
    max_bond: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Bond dimensions in proportion to the effective number of Schmidt values at each bond.

    The exponential of the entanglement entropy counts Schmidt values by weight: m equal values
    count as m, and values of no weight count nothing. It asks for no error, so it compares how
    much the bonds carry rather than how well they are approximated.

    Parameters
    ----------
    spectra : sequence of array
        Per bond: Schmidt values, descending, in any array library.
    shape : MPOShape
        What the bonds belong to.
    scale : float
        What the effective numbers are multiplied by, positive.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.

    Returns
    -------
    tuple of int
        Per bond: ``scale`` · exp(entropy), rounded up, at most the number of Schmidt values, and
        no more than ``max_bond`` and the neighbours can use.

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
    wanted = []
    for values, cap in zip(_check_spectra(spectra, shape), caps, strict=True):
        effective = min(scale * exp(entanglement_entropy(values)), cap, len(values))
        # exp(log m) may come out a little above m, and must not count as m + 1.
        wanted.append(max(1, ceil(effective * (1 - 1e-9))))
    return shape.bond_dims(wanted)


def _check_spectra(spectra: Sequence[Array], shape: MPOShape) -> list[np.ndarray]:
    """The spectra as NumPy arrays, refused unless they are one spectrum per bond."""
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
    """The spectra divided by their largest value, so that squares neither over- nor underflow."""
    largest = max((values.max() for values in spectra), default=0.0)
    with np.errstate(under="ignore"):
        return [values / largest if largest > 0 else values for values in spectra]


def _allowed_square(rtol: float, tails: Sequence[np.ndarray]) -> float:
    """Squared absolute error that ``rtol`` allows; a tail of nothing kept is a squared norm."""
    square = max((float(tail[0]) for tail in tails), default=0.0)
    # Every bond together can lose one norm each; more cannot be allowed, and might overflow.
    return min(float(rtol), 1.0 + len(tails)) ** 2 * square


def _check_bonds(bonds: Sequence[int], shape: MPOShape) -> tuple[int, ...]:
    """The bonds as a tuple, refused unless all of every bond can be used."""
    if not isinstance(bonds, Sequence) or len(bonds) != shape.sites - 1:
        raise InputError(f"bonds need one value per bond: got {bonds} for {shape.sites - 1} bonds")
    chosen = tuple(positive_int("every bond", bond) for bond in bonds)
    if shape.bond_dims(chosen) != chosen:
        raise InputError(
            f"bonds={chosen} do not fit {shape}: the largest that fit are {shape.bond_dims(chosen)}"
        )
    return chosen
