"""Settings of experts' matrices: which are MPOs, their shapes and bonds, and what is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from tnmoe.errors import InputError, check_bool, check_one_of
from tnmoe.options import LAYOUTS, MATRICES, Layout, Matrix
from tnmoe.shapes import MPOShape, SharedSites

# Group size of a split shape: large enough to leave experts some freedom, small enough to be cheap.
_SPLIT_GROUP = 64


@dataclass(frozen=True)
class MPOSettings:
    """How the matrices of one projection become MPOs.

    Attributes
    ----------
    shape : MPOShape
        Legs and size of every expert's matrix.
    max_bond : int or None
        Largest bond dimension; None for exact bonds.
    shared_sites : {"center", "none"} or iterable of int
        Sites whose cores all experts share.
    """

    shape: MPOShape
    max_bond: int | None
    shared_sites: SharedSites


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
    sites: int,
    up_shape: MPOShape | None,
    down_shape: MPOShape | None,
    max_bond: int | Mapping[str, int | None] | None,
    shared_sites: SharedSites | Mapping[str, SharedSites],
    matrices: Iterable[Matrix],
) -> dict[str, MPOSettings]:
    """Resolve the settings of each projection whose matrices are MPOs.

    Parameters
    ----------
    sizes : mapping from str to (int, int)
        Rows and columns of the matrices of every projection: ``up``, ``down`` and perhaps ``gate``.
    layout, sites, up_shape, down_shape, max_bond, shared_sites, matrices
        As for :class:`tnmoe.nn.MPOExperts`.

    Returns
    -------
    dict from str to MPOSettings
        Without the projections that ``matrices`` leaves out.

    Raises
    ------
    InputError
        If a name is unknown or a shape is for a matrix of another size.
    """
    chosen = check_matrices(matrices, sizes)
    up = _shape_for("up_shape", up_shape, sizes["up"], layout, sites)
    down = _shape_for("down_shape", down_shape, sizes["down"], layout, sites)
    bonds = per_projection("max_bond", max_bond, None)
    shared = per_projection("shared_sites", shared_sites, "center")
    return {
        name: MPOSettings(down if name == "down" else up, bonds[name], shared[name])
        for name in sizes
        if name in chosen
    }


def _shape_for(
    name: str, given: MPOShape | None, size: tuple[int, int], layout: Layout, sites: int
) -> MPOShape:
    """Return the given shape after a check of its size, or by default the layout's shape."""
    check_one_of("layout", layout, LAYOUTS)
    if given is None:
        return layout_shape(layout, *size, sites)
    if (given.out_features, given.in_features) != size:
        raise InputError(f"{name} must be for a {size[0]}×{size[1]} matrix, got {given}")
    return given


def layout_shape(layout: str, out_features: int, in_features: int, sites: int = 5) -> MPOShape:
    """Return the shape that a layout gives a matrix.

    Parameters
    ----------
    layout : {"interleaved", "split"}
        ``interleaved`` is ``MPOShape.for_matrix`` with ``sites`` sites. ``split`` is
        ``MPOShape.split`` with groups of 64, or of the greatest common divisor with 64.
    out_features, in_features : int
        Size of the matrix.
    sites : int
        Number of sites of an interleaved shape.

    Raises
    ------
    InputError
        If the layout is unknown, or neither size has a divisor in common with 64.
    """
    check_one_of("layout", layout, LAYOUTS)
    if layout == "interleaved":
        return MPOShape.for_matrix(out_features, in_features, sites)
    groups = (gcd(out_features, _SPLIT_GROUP), gcd(in_features, _SPLIT_GROUP))
    if groups == (1, 1):
        raise InputError(
            f"layout='split' has no groups for a {out_features}×{in_features} matrix, whose sizes "
            f"share no divisor with {_SPLIT_GROUP}: experts would own one number each; give "
            "shapes, or layout='interleaved'"
        )
    return MPOShape.split(out_features, in_features, *groups)


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
