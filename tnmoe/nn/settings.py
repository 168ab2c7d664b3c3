"""Settings of experts' matrices: which are MPOs, their shapes and bonds, and what is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from numbers import Integral
from typing import Any

from tnmoe.errors import (
    InputError,
    check_bool,
    check_number_in,
    check_one_of,
    check_positive_int,
    short_repr,
)
from tnmoe.factors import factorize, number_of_sites, padded_size
from tnmoe.options import LAYOUTS, MATRICES, Layout, Matrix
from tnmoe.shapes import MPOShape, SharedSites, is_padded

# Default group size of split and hidden shapes: large enough to leave experts some freedom, small
# enough to be cheap.
GROUP_SIZE = 64

# Default number of sites, and default bond of residual matrices.
_SITES = {"interleaved": 5, "residual": 2}
RESIDUAL_BOND = 16

# The projections that experts can have.
_PROJECTIONS_OF_EXPERTS = ({"up", "down"}, {"up", "gate", "down"}, {"gate_up", "down"})

# Sizes of the groups of a split or hidden shape: one site per size.
GroupSize = int | Sequence[int]


@dataclass(frozen=True)
class MPOSettings:
    """How the matrices of one projection become MPOs.

    Attributes
    ----------
    layout : {"interleaved", "split", "hidden", "residual"}
    shape : MPOShape
        Legs and size of every expert's matrix.
    center_site : int
        Site of the central core.
    max_bond : int or None
        Largest bond dimension; None for exact bonds.
    enlarged_bond : (int, int) or None
        Number of a bond that is larger than one matrix needs, and its dimension.
    shared_sites : {"center", "none"} or iterable of int
        Sites whose cores all experts share.
    """

    layout: Layout
    shape: MPOShape
    center_site: int
    max_bond: int | None
    enlarged_bond: tuple[int, int] | None
    shared_sites: SharedSites

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Inner bond dimensions."""
        bonds = list(_bonds(self.layout, self.shape, self.center_site, self.max_bond))
        if self.enlarged_bond is not None:
            number, dimension = self.enlarged_bond
            bonds[number] = dimension
        return tuple(bonds)

    @property
    def keeps_matrix(self) -> bool:
        """Whether the pretrained matrix itself, as it stands, is what experts share."""
        exact = self.max_bond is None and self.enlarged_bond is None
        return self.layout == "residual" or (self.layout == "hidden" and exact)


def projection_sizes(
    hidden_size: int, intermediate_size: int, gated: bool
) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the matrices of every projection.

    Raises
    ------
    InputError
        If ``gated`` is not a bool.
    """
    sizes = {"up": (intermediate_size, hidden_size), "down": (hidden_size, intermediate_size)}
    return {**sizes, "gate": sizes["up"]} if check_bool("gated", gated) else sizes


def mpo_settings(
    sizes: Mapping[str, tuple[int, int]],
    *,
    layout: Layout,
    sites: int | None,
    group_size: GroupSize,
    bond_ratio: float,
    up_shape: MPOShape | None,
    down_shape: MPOShape | None,
    max_bond: int | Mapping[str, int | None] | None,
    shared_sites: SharedSites | Mapping[str, SharedSites] | None,
    matrices: Iterable[Matrix],
) -> dict[str, MPOSettings]:
    """Resolve the settings of each projection whose matrices are MPOs.

    Parameters
    ----------
    sizes : mapping from str to (int, int)
        Rows and columns of the matrices of every projection: ``up``, ``down`` and perhaps ``gate``.
    layout, sites, group_size, bond_ratio, up_shape, down_shape, max_bond, shared_sites, matrices
        As for :class:`tnmoe.nn.MPOExperts`.

    Returns
    -------
    dict from str to MPOSettings
        Without the projections that ``matrices`` leaves out.

    Raises
    ------
    InputError
        If a name is unknown, a shape is for a matrix of another size, or the layout cannot use a
        setting.
    """
    chosen = check_matrices(matrices, sizes)
    check_one_of("layout", layout, LAYOUTS)
    check_sites_and_groups(layout, sites, group_size)
    default_sites: SharedSites = "none" if layout == "residual" else "center"
    bonds = per_projection("max_bond", max_bond, None)
    shared = per_projection("shared_sites", shared_sites, None)
    settings: dict[str, MPOSettings] = {}
    for name, size in sizes.items():
        if name not in chosen:
            continue
        check_shared_sites(layout, shared[name])
        side: Matrix = "down" if name == "down" else "up"
        given = down_shape if side == "down" else up_shape
        if given is None:
            shape = layout_shape(layout, side, size, sites=sites, group_size=group_size)
        else:
            shape = _check_size(f"{side}_shape", given, size)
        bond = RESIDUAL_BOND if layout == "residual" and bonds[name] is None else bonds[name]
        center_site = shape.center_site
        if layout == "hidden":
            center_site = end_site(shape, 0 if side == "down" else shape.sites - 1)
        settings[name] = MPOSettings(
            layout,
            shape,
            center_site,
            bond,
            enlarged_bond=_enlarged_bond(layout, side, shape, center_site, bond, bond_ratio),
            shared_sites=default_sites if shared[name] is None else shared[name],
        )
    return settings


def _check_size(name: str, given: MPOShape, size: tuple[int, int]) -> MPOShape:
    """Return a given shape after a check of its size."""
    if (given.out_features, given.in_features) != size:
        raise InputError(f"{name} must be for a {size[0]}×{size[1]} matrix, got {given}")
    return given


def _enlarged_bond(
    layout: Layout,
    side: Matrix,
    shape: MPOShape,
    center_site: int,
    max_bond: int | None,
    bond_ratio: float,
) -> tuple[int, int] | None:
    """Return number and dimension of the bond that holds several matrices; None at ratio 1."""
    ratio = check_bond_ratio(layout, bond_ratio, max_bond)
    if ratio == 1:
        return None
    bond = center_site if side == "down" else center_site - 1
    if not 0 <= bond < shape.sites - 1:
        raise InputError(f"bond_ratio needs a site on the hidden side of the centre, got {shape}")
    return bond, round(ratio * _bonds(layout, shape, center_site, None)[bond])


def _bonds(
    layout: Layout, shape: MPOShape, center_site: int, max_bond: int | None
) -> tuple[int, ...]:
    if layout == "hidden" and max_bond is None:
        return square_bonds(shape, center_site)
    return shape.bond_dims(max_bond)


def check_sites_and_groups(layout: str, sites: int | None, group_size: GroupSize) -> None:
    """Raise an InputError if a layout's shapes depend on only one of two settings, and not on this.

    Parameters
    ----------
    layout : {"interleaved", "split", "hidden", "residual"}
    sites : int or None
        None if it was not given.
    group_size : int or sequence of int
    """
    has_groups = layout in ("split", "hidden")
    if sites is not None and has_groups:
        raise InputError(
            "sites is for layout='interleaved' and 'residual', got "
            f"sites={sites} with layout={layout!r}, where group_size makes the sites"
        )
    is_default = isinstance(group_size, Integral) and group_size == GROUP_SIZE
    if not has_groups and not is_default:
        raise InputError(
            "group_size is for layout='split' and 'hidden', got "
            f"group_size={group_size!r} with layout={layout!r}"
        )


def layout_shape(
    layout: str,
    side: str,
    size: tuple[int, int],
    *,
    sites: int | None = None,
    group_size: GroupSize = GROUP_SIZE,
) -> MPOShape:
    """Return the shape that a layout gives a matrix.

    Parameters
    ----------
    layout : {"interleaved", "split", "hidden", "residual"}
        ``interleaved`` is :meth:`MPOShape.for_matrix`. ``split`` is :meth:`MPOShape.split`.
        ``hidden`` is the same with legs on the hidden side only: outputs of ``up``, inputs of
        ``down``. ``residual`` has output legs at its first sites and input legs at the others.
    side : {"up", "gate", "down"}
        Which matrix it is.
    size : (int, int)
        Rows and columns of the matrix.
    sites : int, optional
        Number of sites of an interleaved shape, 5 by default, or of a residual one, 2 by default.
    group_size : int or sequence of int
        Groups of a split or hidden shape. A single number stands for its greatest common divisor
        with the size that it divides.

    Raises
    ------
    InputError
        If the layout is unknown, a residual shape has a single site, or groups do not divide their
        size.
    """
    check_one_of("layout", layout, LAYOUTS)
    rows, columns = size
    number = number_of_sites(_SITES.get(layout, 1) if sites is None else sites)
    if layout == "interleaved":
        return MPOShape.for_matrix(rows, columns, number)
    if layout == "residual":
        return _residual_shape(rows, columns, number)
    left, right = _groups(rows, group_size), _groups(columns, group_size)
    if layout == "hidden":
        left, right = (left, ()) if side != "down" else ((), right)
    if {*left, *right} <= {1}:
        raise InputError(
            f"layout={layout!r} has no groups for a {rows}×{columns} matrix, whose sizes share no "
            f"divisor with {group_size}: experts would own one number each; give a group_size or "
            "shapes, or another layout"
        )
    return MPOShape.split(rows, columns, left, right)


def _groups(size: int, group_size: GroupSize) -> tuple[int, ...]:
    if isinstance(group_size, Sequence) and not isinstance(group_size, str):
        return tuple(group_size)
    return (gcd(size, check_positive_int("group_size", group_size)),)


def _residual_shape(rows: int, columns: int, sites: int) -> MPOShape:
    """Return a shape with output legs at the first half of its sites, input legs at the second."""
    if sites < 2:
        raise InputError(f"layout='residual' needs at least 2 sites, got {sites}")
    right = sites // 2
    left = sites - right
    outs, ins = (
        factorize(padded_size(size, count), count)
        for size, count in ((rows, left), (columns, right))
    )
    return MPOShape((*outs, *(1,) * right), (*(1,) * left, *ins), rows, columns)


def end_site(shape: MPOShape, center_site: int | None = None) -> int:
    """Return the central site of a shape of the layout ``hidden``.

    It stands at the right end of the chain and has all input legs, or at the left end and has all
    output legs, so that its core is a matrix as a linear module stores it.

    Parameters
    ----------
    shape : MPOShape
    center_site : int, optional
        The site; by default the end that has all legs of a side, the right end first.

    Raises
    ------
    InputError
        If that site does not have all legs of its side, or the shape is padded.
    """
    last = shape.sites - 1
    fits = {
        last: shape.in_dims[last] == shape.in_features,
        0: shape.out_dims[0] == shape.out_features,
    }
    for site in (last, 0) if center_site is None else (center_site,):
        if fits.get(site) and not is_padded(shape):
            return site
    raise InputError(
        "layout='hidden' needs all input legs at the last site or all output legs at the first "
        f"one, and no padding; got {shape}"
        + ("" if center_site is None else f" with center_site={center_site}")
    )


def square_bonds(shape: MPOShape, center_site: int) -> tuple[int, ...]:
    """Return the bonds of a hidden shape at which the cores of experts are square.

    These are products of the legs that experts own. The shared core then holds one matrix.
    """
    cuts = range(1, shape.sites)
    if center_site:
        return tuple(prod(shape.out_dims[:cut]) for cut in cuts)
    return tuple(prod(shape.in_dims[cut:]) for cut in cuts)


def check_bond_ratio(layout: str, bond_ratio: float, max_bond: int | None) -> float:
    """Return the ratio of the shared bond; raise an InputError where that bond cannot be enlarged.

    Parameters
    ----------
    layout, bond_ratio, max_bond
        As for :class:`tnmoe.nn.MPOExperts`, ``max_bond`` of one projection.
    """
    ratio = check_number_in("bond_ratio", bond_ratio, "[1, inf)")
    if ratio > 1 and (layout not in ("hidden", "split") or max_bond is not None):
        raise InputError(
            "bond_ratio enlarges the exact bonds of layout='hidden' and 'split': got "
            f"bond_ratio={ratio}, layout={layout!r}, max_bond={max_bond}"
        )
    return ratio


def check_shared_sites(layout: str, shared_sites: SharedSites | None) -> None:
    """Raise an InputError for shared sites that a layout cannot use.

    Parameters
    ----------
    layout, shared_sites
        As for :class:`tnmoe.nn.MPOExperts`, ``shared_sites`` of one projection.
    """
    if layout == "hidden" and shared_sites not in (None, "center"):
        raise InputError(
            "experts of layout='hidden' share their central core and nothing else, got "
            f"shared_sites={short_repr(shared_sites)}"
        )


def check_matrices(names: Iterable[str], present: Iterable[str] = MATRICES) -> tuple[Matrix, ...]:
    """Return names of matrices; check that all are known and that the network has one of them.

    Raises
    ------
    InputError
        If a name is unknown, or the network has none of the matrices in ``present``.
    """
    several = (names,) if isinstance(names, str) else names
    chosen: tuple[Any, ...] = tuple(several) if isinstance(several, Iterable) else ()
    if not chosen or not all(name in MATRICES for name in chosen):
        raise InputError(f"matrices must be some of {', '.join(MATRICES)}, got {names!r}")
    if not set(chosen) & set(present):
        raise InputError(
            f"matrices={[*chosen]} names no matrix of the network, which has {', '.join(present)}"
        )
    return chosen


def check_projections(names: Iterable[str]) -> None:
    """Raise an InputError if experts cannot have the projections of these names, and no others."""
    given = set(names)
    if given not in _PROJECTIONS_OF_EXPERTS:
        raise InputError(
            "experts have up, down and perhaps gate, or gate_up and down; "
            f"got {', '.join(sorted(given)) or 'none'}"
        )


def per_projection(name: str, value: Any, default: Any) -> dict[str, Any]:
    """Return a setting of every projection, from one value for all or a mapping for some.

    Raises
    ------
    InputError
        If the mapping names an unknown projection.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(MATRICES, value)
    if unknown := sorted(set(value) - set(MATRICES)):
        raise InputError(f"{name} is for {', '.join(MATRICES)}, got {unknown}")
    return {**dict.fromkeys(MATRICES, default), **value}
