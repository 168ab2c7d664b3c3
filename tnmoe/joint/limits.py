"""What a caller allows a joint decomposition, and the bonds that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tnmoe.errors import InputError, check_number_in, check_positive_int
from tnmoe.shapes import MPOShape, chain_shapes, joint_shape, shared_bond_dims

# Ratio of neighbouring bonds in the family that a search for an error tries.
_GROWTH = 1.1


class SharedLimits:
    """What a caller allows a joint decomposition, checked against a shape.

    Parameters
    ----------
    shape : MPOShape
        Legs of the chains.
    owned : sequence of int
        Sites whose cores experts own.
    num_experts : int
        Number of experts E.
    max_bond, bonds, rtol, max_params
        As for :func:`tnmoe.decompose_shared`.
    base_params : int
        Number of parameters of a base.
    enlarges : bool
        Whether bonds may be larger than a single matrix needs.

    Attributes
    ----------
    caps : tuple of int
        Largest dimension of every bond.

    Raises
    ------
    InputError
        If an argument is out of range, or two of them contradict each other.
    """

    def __init__(
        self,
        shape: MPOShape,
        owned: Sequence[int],
        num_experts: int,
        *,
        max_bond: int | Sequence[int] | None,
        bonds: Sequence[int] | None,
        rtol: float | None,
        max_params: int | None,
        base_params: int = 0,
        enlarges: bool = True,
    ) -> None:
        self.shape, self.owned, self.num_experts = shape, owned, num_experts
        self.base_params = base_params
        self.spans = num_experts if enlarges else 1
        self.caps = shared_bond_dims(shape, owned, self.spans, max_bond)
        self.max_bond, self.bonds, self.max_params = max_bond, None, None
        self.rtol = None if rtol is None else check_number_in("rtol", rtol, "[0, inf)")
        if max_params is not None:
            self.max_params = check_positive_int("max_params", max_params)
            fewest = self.num_params((1,) * len(self.caps))
            if self.max_params < fewest:
                raise InputError(
                    f"max_params={max_params} is too few for {num_experts} experts of {shape}: "
                    f"with all bonds 1 they have {fewest} parameters"
                )
        if bonds is not None:
            self.bonds = self._check_bonds(bonds)

    def _check_bonds(self, bonds: Sequence[int]) -> tuple[int, ...]:
        count = len(self.caps)
        if not isinstance(bonds, Sequence) or len(bonds) != count:
            raise InputError(f"bonds need one value per bond: got {bonds} for {count} bonds")
        checked = tuple(check_positive_int("every bond", bond) for bond in bonds)
        largest = shared_bond_dims(self.shape, self.owned, self.spans, checked)
        if largest != checked:
            raise InputError(
                f"bonds={checked} do not fit {self.num_experts} experts of {self.shape}: the "
                f"largest that fit are {largest}"
            )
        if any(bond > cap for bond, cap in zip(checked, self.caps, strict=True)):
            raise InputError(f"bonds={checked} exceed max_bond={self.max_bond}")
        params = self.num_params(checked)
        if self.max_params is not None and params > self.max_params:
            raise InputError(
                f"bonds={checked} have {params} parameters, more than max_params={self.max_params}"
            )
        return checked

    def num_params(self, bonds: Sequence[int]) -> int:
        """Count the stored parameters of chains with these bonds, and of the base."""
        sizes = map(prod, chain_shapes(self.shape, tuple(bonds)))
        return self.base_params + sum(
            size * self.num_experts if site in self.owned else size
            for site, size in enumerate(sizes)
        )

    def family(self) -> list[tuple[int, ...]]:
        """Return bonds from the smallest to exact ones, all within the limits.

        Of the sites that experts own, the one that makes exact chains smallest may have bonds
        beyond those of a single matrix.
        """
        if self.bonds is not None:
            return [self.bonds]
        shapes = [joint_shape(self.shape, site, self.spans) for site in self.owned]
        shape = min(shapes, key=lambda each: self.num_params(each.bond_dims()))
        exact = shape.bond_dims(list(self.caps))
        bonds, cap = [exact], float(max(exact, default=1))
        while cap > 1:
            cap = max(1.0, min(cap / _GROWTH, cap - 1))
            smaller = shape.bond_dims([min(bond, int(cap)) for bond in exact])
            if smaller != bonds[-1]:
                bonds.append(smaller)
        if self.max_params is not None:
            fitting = [each for each in bonds if self.num_params(each) <= self.max_params]
            bonds = [self._filled(fitting[0], exact, shape), *fitting[1:]]
        return bonds[::-1]

    def _filled(
        self, bonds: tuple[int, ...], exact: tuple[int, ...], shape: MPOShape
    ) -> tuple[int, ...]:
        """Enlarge bonds one by one, the relatively smallest first, as long as they fit."""
        assert self.max_params is not None
        while True:
            order = sorted(range(len(bonds)), key=lambda bond: bonds[bond] / exact[bond])
            for bond in order:
                wanted = [size + (number == bond) for number, size in enumerate(bonds)]
                larger = shape.bond_dims(list(map(min, wanted, exact)))
                if larger != bonds and self.num_params(larger) <= self.max_params:
                    bonds = larger
                    break
            else:
                return bonds
