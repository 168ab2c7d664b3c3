"""What a caller allows a truncation, and the bonds that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import gt

import numpy as np

from tnmoe.errors import InputError, check_number_in, check_positive_int, short_repr
from tnmoe.shapes import MPOShape
from tnmoe.truncation.budget import ErrorBudget
from tnmoe.truncation.search import choose_bonds
from tnmoe.truncation.spectra import squared_loss, squared_tails


@dataclass(frozen=True)
class Limits:
    """What a caller allows a truncation, checked against a shape.

    Parameters
    ----------
    shape : MPOShape
        Legs of the operator.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond.
    rtol : float, optional
        Largest relative Frobenius error of the whole.
    max_params : int, optional
        Largest number of parameters of all cores together.

    Raises
    ------
    InputError
        If an argument is out of range, or two of them contradict each other.
    """

    shape: MPOShape
    _: KW_ONLY
    max_bond: int | Sequence[int] | None = None
    bonds: Sequence[int] | None = None
    rtol: float | None = None
    max_params: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "rtol", _check_rtol(self.rtol, self.shape))
        caps = self.shape.bond_dims(self.max_bond)
        if self.max_params is not None:
            set_field(self, "max_params", _check_max_params(self.max_params, self.shape))
        if self.bonds is None:
            return
        bonds = _check_bonds(self.bonds, self.shape)
        set_field(self, "bonds", bonds)
        if any(map(gt, bonds, caps)):
            raise InputError(f"bonds={bonds} exceed max_bond={self.max_bond}")
        params = self.shape.num_params(bonds)
        if self.max_params is not None and params > self.max_params:
            raise InputError(
                f"bonds={bonds} have {params} parameters, more than max_params={self.max_params}"
            )

    @property
    def caps(self) -> tuple[int, ...]:
        """Largest dimension of every bond."""
        return self.shape.bond_dims(self.max_bond if self.bonds is None else self.bonds)

    @property
    def needs_spectra(self) -> bool:
        """Whether the bonds depend on the Schmidt values."""
        if self.rtol is not None:
            return True
        return self.max_params is not None and self.shape.num_params(self.caps) > self.max_params

    def choose_bonds(
        self, tails: Sequence[np.ndarray], caps: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Choose the bonds within the limits from the losses at every bond.

        Parameters
        ----------
        tails : sequence of array
            Per bond: the squared error of keeping r = 0, 1, … Schmidt values. At r = 0 it is the
            squared norm.
        caps : sequence of int, optional
            Largest bonds; by default those that the limits leave.

        Raises
        ------
        InputError
            If ``bonds`` were given that lose more than ``rtol`` allows.
        """
        # The largest, since Schmidt values below rounding may be missing at a bond.
        squared_norm = max((float(tail[0]) for tail in tails), default=0.0)
        allowed = None if self.rtol is None else self.rtol**2 * squared_norm
        if self.bonds is None:
            caps = self.caps if caps is None else caps
            return choose_bonds(tails, self.shape, caps, allowed, self.max_params)
        bonds = self.caps
        lost = squared_loss(tails, bonds)
        if allowed is not None and lost > allowed:
            error = (lost / squared_norm) ** 0.5
            raise InputError(
                f"bonds={bonds} may leave a relative error of {error:.3g}, "
                f"more than rtol={self.rtol}"
            )
        return bonds

    def budget(
        self,
        spectra: Sequence[np.ndarray] | None = None,
        present_bonds: Sequence[int] | None = None,
    ) -> ErrorBudget:
        """Divide the allowed error among the bonds.

        Parameters
        ----------
        spectra : sequence of array, shapes (batch, D), optional
            Per bond: Schmidt values of each matrix; used only if ``needs_spectra``.
        present_bonds : sequence of int, optional
            Bonds of the chain that is cut; by default as large as the shape permits.

        Raises
        ------
        InputError
            If ``bonds`` were given that exceed the present ones, or lose more than ``rtol`` allows.
        """
        caps = self.caps if present_bonds is None else self._caps_within(present_bonds)
        if not self.needs_spectra or not spectra:
            return ErrorBudget(caps)
        tails = [squared_tails(values) for values in spectra]
        squared_norms = np.max([tail[:, 0] for tail in tails], axis=0)
        # A batch has one set of bonds, good enough for its worst matrix at every bond.
        relative = [
            (tail / np.where(squared_norms > 0, squared_norms, 1.0)[:, None]).max(axis=0)
            for tail in tails
        ]
        ranks = self.choose_bonds(relative, caps)
        if self.rtol is None or self.bonds is not None:
            return ErrorBudget(ranks)
        allowed = [tail[:, rank] for tail, rank in zip(tails, ranks, strict=True)]
        spare = np.maximum(0.0, self.rtol**2 * squared_norms - np.sum(allowed, axis=0))
        return ErrorBudget(ranks, allowed, spare)

    def _caps_within(self, present_bonds: Sequence[int]) -> tuple[int, ...]:
        if self.bonds is not None and any(map(gt, self.bonds, present_bonds)):
            raise InputError(
                f"bonds={self.bonds} exceed the bonds that are there: {tuple(present_bonds)}"
            )
        return self.shape.bond_dims(list(map(min, self.caps, present_bonds)))


def _check_rtol(rtol: float | None, shape: MPOShape) -> float | None:
    if rtol is None:
        return None
    try:
        rtol = check_number_in("rtol", rtol, "[0, inf)")
    except InputError:
        raise InputError(
            f"rtol must be a finite number of at least 0, got {short_repr(rtol)}"
        ) from None
    # A bond loses the norm of the whole at most, so this allows everything. Squares of larger
    # tolerances may overflow.
    return min(rtol, float(shape.sites))


def _check_max_params(max_params: int, shape: MPOShape) -> int:
    max_params, fewest = check_positive_int("max_params", max_params), shape.num_params(1)
    if max_params < fewest:
        raise InputError(
            f"max_params={max_params} is too few for {shape}: "
            f"with all bonds 1 it has {fewest} parameters"
        )
    return max_params


def _check_bonds(bonds: Sequence[int], shape: MPOShape) -> tuple[int, ...]:
    """Return the bonds as a tuple; raise unless every bond can be used as a whole."""
    if not isinstance(bonds, Sequence) or len(bonds) != shape.sites - 1:
        raise InputError(f"bonds need one value per bond: got {bonds} for {shape.sites - 1} bonds")
    checked = tuple(check_positive_int("every bond", bond) for bond in bonds)
    largest = shape.bond_dims(checked)
    if largest != checked:
        raise InputError(f"bonds={checked} do not fit {shape}: the largest that fit are {largest}")
    return checked
