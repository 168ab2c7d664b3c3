"""Shapes of matrix product operators: how a matrix splits into sites, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from tnmoe.errors import InputError, check_index, check_positive_int, short_repr
from tnmoe.factors import factorize, number_of_sites, padded_size, size_to_split
from tnmoe.options import NamedSites

# Sites whose cores experts share.
SharedSites = NamedSites | Iterable[int]


@dataclass(frozen=True)
class MPOShape:
    """The split of an (out_features × in_features) matrix over the sites of an MPO.

    Site k has an output leg of size ``out_dims[k]`` and an input leg of size ``in_dims[k]``.
    Where the product of the legs exceeds the size of the matrix, zeros pad the matrix.

    Parameters
    ----------
    out_dims, in_dims : sequence of int
        Leg sizes, one per site; all at least 1.
    out_features, in_features : int, optional
        Size of the matrix; by default the products of the legs.

    Raises
    ------
    InputError
        If the two sequences differ in length or are empty, a leg is not a positive integer, or a
        size exceeds the product of its legs.

    Examples
    --------
    >>> shape = MPOShape(out_dims=(4, 4, 8, 6, 4), in_dims=(3, 4, 4, 4, 4))
    >>> shape.out_features, shape.in_features, shape.center_site
    (3072, 768, 2)
    >>> shape.bond_dims()
    (12, 192, 384, 16)
    >>> shape.num_params()
    2544016
    """

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_features: int
    in_features: int

    def __init__(
        self,
        out_dims: Sequence[int],
        in_dims: Sequence[int],
        out_features: int | None = None,
        in_features: int | None = None,
    ) -> None:
        out_dims, in_dims = _as_dims("out_dims", out_dims), _as_dims("in_dims", in_dims)
        if len(out_dims) != len(in_dims):
            raise InputError(
                f"out_dims and in_dims need one leg per site each: got out_dims={out_dims} "
                f"({len(out_dims)} sites) and in_dims={in_dims} ({len(in_dims)} sites)"
            )
        set_field = object.__setattr__
        set_field(self, "out_dims", out_dims)
        set_field(self, "in_dims", in_dims)
        set_field(self, "out_features", _features("out", out_features, out_dims))
        set_field(self, "in_features", _features("in", in_features, in_dims))

    @classmethod
    def for_matrix(cls, out_features: int, in_features: int, sites: int = 5) -> MPOShape:
        """Split a matrix evenly: every site has an output and an input leg.

        Parameters
        ----------
        out_features, in_features : int
            Size of the matrix. A size with a factor of more than 8 times the geometric mean of its
            factors (a large prime, say) is padded to the next size without one. If none of the
            next 2¹⁴ sizes will do, it is padded to a product of 2, 3, 5 and 7.
        sites : int
            Number of sites.

        Raises
        ------
        InputError
            If a size is not an integer from 1 to 2⁴⁰, or ``sites`` is not one from 1 to 100.

        Examples
        --------
        >>> MPOShape.for_matrix(1536, 384)
        MPOShape(out_dims=(4, 4, 6, 4, 4), in_dims=(2, 4, 4, 4, 3))
        >>> MPOShape.for_matrix(50257, 768, sites=3)
        MPOShape(out_dims=(8, 103, 61), in_dims=(8, 12, 8), out_features=50257)
        """
        out_features = size_to_split("out_features", out_features)
        in_features = size_to_split("in_features", in_features)
        sites = number_of_sites(sites)
        return cls(
            factorize(padded_size(out_features, sites), sites),
            factorize(padded_size(in_features, sites), sites),
            out_features,
            in_features,
        )

    @classmethod
    def split(
        cls,
        out_features: int,
        in_features: int,
        left: int | Sequence[int] = 64,
        right: int | Sequence[int] = 64,
    ) -> MPOShape:
        """Split a matrix into output legs left of the centre and input legs right of it.

        Experts of this shape never have to be built: the central core is one dense product for the
        tokens of all experts. With legs on one side only, that product is even the same for all
        experts of a token.

        Parameters
        ----------
        out_features, in_features : int
            Size of the matrix.
        left, right : int or sequence of int
            Output legs of the sites left of the centre, and input legs of the sites right of it.
            Their products must divide ``out_features`` and ``in_features``. One of them may be
            empty.

        Raises
        ------
        InputError
            If a product of legs does not divide its size, or there are no legs.

        Examples
        --------
        >>> MPOShape.split(3072, 768, left=64, right=64)
        MPOShape(out_dims=(64, 48, 1), in_dims=(1, 12, 64))
        >>> MPOShape.split(3072, 768, left=64, right=())
        MPOShape(out_dims=(64, 48), in_dims=(1, 768))
        """
        left_legs = () if left == () else _as_dims("left", _as_sequence(left))
        right_legs = () if right == () else _as_dims("right", _as_sequence(right))
        if not (left_legs or right_legs):
            raise InputError("a split shape needs legs left or right of its centre, got none")
        out_features = check_positive_int("out_features", out_features)
        in_features = check_positive_int("in_features", in_features)
        for side, legs, name, size in (
            ("left", left_legs, "out_features", out_features),
            ("right", right_legs, "in_features", in_features),
        ):
            if size % prod(legs):
                raise InputError(
                    f"the legs of a split shape must divide the matrix: {side}={legs} has product "
                    f"{prod(legs)}, which does not divide {name}={size}"
                )
        return cls(
            (*left_legs, out_features // prod(left_legs), *(1 for _ in right_legs)),
            (*(1 for _ in left_legs), in_features // prod(right_legs), *right_legs),
        )

    @property
    def sites(self) -> int:
        """Number of sites."""
        return len(self.out_dims)

    @property
    def legs(self) -> tuple[int, ...]:
        """Sizes of all sites: output leg times input leg."""
        return tuple(out * in_ for out, in_ in zip(self.out_dims, self.in_dims, strict=True))

    @property
    def padded_out(self) -> int:
        """Product of the output legs: ``out_features`` plus padding."""
        return prod(self.out_dims)

    @property
    def padded_in(self) -> int:
        """Product of the input legs: ``in_features`` plus padding."""
        return prod(self.in_dims)

    @property
    def center_site(self) -> int:
        """Site of the central core: the largest core at exact bonds, of equal ones the middle."""
        sizes = [prod(core) for core in self.core_shapes()]
        middle = (self.sites - 1) / 2
        return min(range(self.sites), key=lambda site: (-sizes[site], abs(site - middle), -site))

    def is_split(self, center_site: int) -> bool:
        """Check whether no output leg lies right of a site and no input leg left of it.

        Raises
        ------
        InputError
            If ``center_site`` is not a site.

        Examples
        --------
        >>> MPOShape.split(3072, 768, left=64, right=64).is_split(1)
        True
        """
        (_, _, out_right), (in_left, _, _) = self.legs_around(center_site)
        return out_right == 1 == in_left

    def legs_around(self, center_site: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the legs left of a site, of the site and right of it: outputs, then inputs.

        Parameters
        ----------
        center_site : int
            Site that the legs are split at.

        Returns
        -------
        tuple of 3 int, tuple of 3 int
            Products of the output legs and of the input legs; 1 for a side without sites.

        Raises
        ------
        InputError
            If ``center_site`` is not a site.

        Examples
        --------
        >>> MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)).legs_around(2)
        ((16, 8, 24), (12, 4, 16))
        """
        center_site = check_index("center_site", center_site, self.sites)
        outs, ins = (
            (prod(dims[:center_site]), dims[center_site], prod(dims[center_site + 1 :]))
            for dims in (self.out_dims, self.in_dims)
        )
        return outs, ins

    def bond_dims(self, max_bond: int | Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the inner bond dimensions, exact or limited.

        Parameters
        ----------
        max_bond : int or sequence of int, optional
            Largest bond dimension, for all bonds or one per bond. Without it the bonds are exact:
            they can hold every matrix of this shape.

        Returns
        -------
        tuple of int
            ``sites - 1`` dimensions. No bond is larger than its neighbours can use.
        """
        legs = self.legs
        caps = self._cap_per_bond(max_bond)
        bonds = [1]
        for cap, leg in zip(caps, legs[:-1], strict=True):
            bonds.append(min(cap, bonds[-1] * leg))
        bonds.append(1)
        for bond in range(self.sites - 1, 0, -1):
            bonds[bond] = min(bonds[bond], bonds[bond + 1] * legs[bond])
        return tuple(bonds[1:-1])

    def core_shapes(
        self, max_bond: int | Sequence[int] | None = None
    ) -> tuple[tuple[int, int, int, int], ...]:
        """Return the shapes (left bond, out, in, right bond) of all cores.

        Parameters
        ----------
        max_bond : int or sequence of int, optional
            As for :meth:`bond_dims`; exact bonds by default.
        """
        return chain_shapes(self, self.bond_dims(max_bond))

    def num_params(self, max_bond: int | Sequence[int] | None = None) -> int:
        """Count the parameters of all cores together.

        Parameters
        ----------
        max_bond : int or sequence of int, optional
            As for :meth:`bond_dims`; exact bonds by default.
        """
        return sum(prod(core) for core in self.core_shapes(max_bond))

    def _cap_per_bond(
        self, max_bond: int | Sequence[int] | None, num_experts: int = 1
    ) -> tuple[int, ...]:
        bonds = self.sites - 1
        if max_bond is None:
            return (self.padded_out * self.padded_in * num_experts**2,) * bonds
        if not isinstance(max_bond, Sequence):
            return (check_positive_int("max_bond", max_bond),) * bonds
        if len(max_bond) != bonds:
            raise InputError(
                f"max_bond needs one value or one per bond: got {max_bond} for {bonds} bonds"
            )
        return tuple(check_positive_int("max_bond", cap) for cap in max_bond)

    def __repr__(self) -> str:
        padded = ""
        if self.out_features != self.padded_out:
            padded += f", out_features={short_repr(self.out_features)}"
        if self.in_features != self.padded_in:
            padded += f", in_features={short_repr(self.in_features)}"
        return f"MPOShape(out_dims={self.out_dims}, in_dims={self.in_dims}{padded})"


def chain_shapes(shape: MPOShape, bonds: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the shapes (left bond, out, in, right bond) of the cores of a chain.

    Unlike :meth:`MPOShape.core_shapes` it takes bonds larger than their neighbours can use.
    """
    return tuple(
        (left, out, in_, right)
        for (left, right), out, in_ in zip(
            pairwise((1, *bonds, 1)), shape.out_dims, shape.in_dims, strict=True
        )
    )


def shared_bond_dims(
    shape: MPOShape,
    owned: Iterable[int],
    num_experts: int,
    max_bond: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the largest bonds that the chains of experts can use who share some cores.

    A single chain needs no bond larger than the legs on either side of it. Cores of E experts span
    E times as much together, which a shared core beside them can use.

    Parameters
    ----------
    shape : MPOShape
    owned : iterable of int
        Sites whose cores experts own.
    num_experts : int
        Number of experts E.
    max_bond : int or sequence of int, optional
        As for :meth:`MPOShape.bond_dims`.

    Examples
    --------
    >>> shape = MPOShape((2, 2, 2), (2, 2, 2))
    >>> shape.bond_dims(), shared_bond_dims(shape, {0, 2}, 3)
    ((4, 4), (12, 12))
    """
    owned, last = set(owned), shape.sites - 1
    spans = [leg * num_experts if site in owned else leg for site, leg in enumerate(shape.legs)]

    def span(site: int, beyond: int) -> int:
        # Where an expert owns both cores, it needs no more than a single chain.
        return shape.legs[site] if {site, beyond} <= owned else spans[site]

    caps = shape._cap_per_bond(max_bond, num_experts)
    bonds = [1] * (shape.sites + 1)
    for site in range(last):
        bonds[site + 1] = min(caps[site], bonds[site] * span(site, site + 1))
    for site in range(last, 0, -1):
        bonds[site] = min(bonds[site], bonds[site + 1] * span(site, site - 1))
    return tuple(bonds[1:-1])


def joint_shape(shape: MPOShape, site: int, num_experts: int) -> MPOShape:
    """Return the legs of all experts' matrices as one matrix, whose rows a site tells apart.

    Examples
    --------
    >>> joint_shape(MPOShape((2, 3), (5, 7)), 1, 10)
    MPOShape(out_dims=(2, 30), in_dims=(5, 7))
    """
    out_dims = list(shape.out_dims)
    out_dims[site] *= num_experts
    return MPOShape(out_dims, shape.in_dims)


def resolve_center_site(shape: MPOShape, center_site: int | None) -> int:
    """Return ``center_site``, checked, or by default the site of the shape's central core."""
    if center_site is None:
        return shape.center_site
    return check_index("center_site", center_site, shape.sites)


def resolve_sites(shape: MPOShape, sites: int | Iterable[int], name: str) -> tuple[int, ...]:
    """Return the numbers of one or several sites in ascending order.

    Raises
    ------
    InputError
        If there are none, one is named twice, or one does not exist.
    """
    chosen = tuple(sites) if isinstance(sites, Iterable) else (sites,)
    checked = sorted(check_index(f"every site of {name}", site, shape.sites) for site in chosen)
    if not checked or len(set(checked)) < len(checked):
        raise InputError(f"{name} must name at least one site, and none twice, got {checked}")
    return tuple(checked)


def resolve_shared_sites(
    shared_sites: str | Iterable[int], sites: int, center_site: int
) -> frozenset[int]:
    """Return the numbers of the sites that experts share, from a name or from the numbers.

    Raises
    ------
    InputError
        If the name is unknown, a site does not exist, or experts would own no site.
    """
    named: dict[str, frozenset[int]] = {"center": frozenset({center_site}), "none": frozenset()}
    if isinstance(shared_sites, str):
        if shared_sites not in named:
            raise InputError(
                f"shared_sites must be one of {', '.join(named)} or sites, got {shared_sites!r}"
            )
        chosen = named[shared_sites]
    elif isinstance(shared_sites, Iterable):
        chosen = frozenset(check_index("every shared site", site, sites) for site in shared_sites)
    else:
        raise InputError(
            f"shared_sites must be a name or the numbers of sites, got {shared_sites!r}"
        )
    if len(chosen) == sites:
        raise InputError(
            f"experts that share all {sites} sites would be the same: leave some sites out"
        )
    return chosen


def is_padded(shape: MPOShape) -> bool:
    """Check whether the legs hold more than the matrix, along its rows or its columns."""
    return (shape.padded_out, shape.padded_in) != (shape.out_features, shape.in_features)


def _as_sequence(dims: int | Sequence[int]) -> Sequence[int]:
    return dims if isinstance(dims, Sequence) else (dims,)


def _as_dims(name: str, dims: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(dims)
    except TypeError:
        raise InputError(
            f"{name} must be a sequence of positive integers, got {short_repr(dims)}"
        ) from None
    if not dims:
        raise InputError(f"{name} needs at least one site, got {dims}")
    subject = f"every leg of {name}={short_repr(dims)}"
    return tuple(check_positive_int(subject, dim) for dim in dims)


def _features(side: str, size: int | None, dims: tuple[int, ...]) -> int:
    if size is None:
        return prod(dims)
    size = check_positive_int(f"{side}_features", size)
    if size > prod(dims):
        raise InputError(
            f"{side}_features={short_repr(size)} does not fit {side}_dims={short_repr(dims)}, "
            f"whose product is {short_repr(prod(dims))}"
        )
    return size
