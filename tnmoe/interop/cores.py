"""An MPO as a plain list of cores, whose axes stand in any order, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from typing import Any

from tnmoe.backends import Array, get_backend
from tnmoe.errors import InputError, short_repr
from tnmoe.interop.checks import check_unpadded, in_common_dtype
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape

# The axes of a core of an MPO, in its own order.
_OWN = "loir"
_NAMES = {"l": "left bond", "o": "output leg", "i": "input leg", "r": "right bond"}


def to_cores(mpo: MPO, axes: str = "loir", *, outermost_bonds: bool = True) -> list[Array]:
    """Return the cores of an MPO as a list of arrays, with their axes in a given order.

    Parameters
    ----------
    mpo : MPO
        An operator without padding.
    axes : str
        The axes of a core: ``l`` for the left bond, ``o`` for the output leg, ``i`` for the input
        leg and ``r`` for the right bond. Legs in parentheses become one axis: in ``"l(oi)r"`` the
        input leg counts faster, in ``"l(io)r"`` the output leg.
    outermost_bonds : bool
        Whether the first core has its left bond and the last core its right bond, which have
        dimension 1.

    Returns
    -------
    list of array
        The cores' own arrays if ``axes`` is ``"loir"`` and no bond is left out. Otherwise views of
        them where the library has views.

    Raises
    ------
    InputError
        If ``axes`` does not name the four axes, or the shape is padded, which a list of cores
        cannot express.
    TypeError
        If ``mpo`` is not an MPO.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (5, 7)), max_bond=4, rng=0)
    >>> [core.shape for core in to_cores(mpo, "lroi")]
    [(1, 4, 2, 5), (4, 1, 3, 7)]
    >>> [core.shape for core in to_cores(mpo, "l(oi)r", outermost_bonds=False)]
    [(10, 4), (4, 21)]
    """
    check_unpadded(mpo)
    groups = _groups(axes)
    if outermost_bonds and groups == list(_OWN):
        return list(mpo.cores)
    xp = get_backend(mpo.cores[0])
    order = [_OWN.index(letter) for group in groups for letter in group]
    cores = []
    for site, core in enumerate(mpo.cores):
        sizes = dict(zip(_OWN, core.shape, strict=True))
        left_out = set() if outermost_bonds else _outermost(site, mpo.shape.sites)
        kept = [group for group in groups if group not in left_out]
        permuted = xp.permute(core, order)
        cores.append(permuted.reshape(*(prod(sizes[leg] for leg in group) for group in kept)))
    return cores


def from_cores(cores: Iterable[Array], axes: str = "loir", shape: MPOShape | None = None) -> MPO:
    """Turn a list of cores into an MPO; no gauge is assumed.

    Parameters
    ----------
    cores : iterable of array
        One array per site, of any supported library, with its axes in the order of ``axes``. The
        first core may lack its left bond and the last core its right bond. The MPO shares memory
        with the arrays where the library has views. Cores of different dtypes are converted to one
        dtype that holds all of their numbers.
    axes : str
        The axes of a core, as for :func:`to_cores`.
    shape : MPOShape, optional
        Legs and matrix size. By default they are read from the cores, without padding. Cores whose
        legs share one axis need it.

    Raises
    ------
    InputError
        If ``axes`` does not name the four axes, a core has another number of axes, neighbouring
        bonds differ, the outermost bonds are not 1, or the cores do not fit ``shape``. Also if the
        numbers are integers.
    TypeError
        If the arrays belong to no supported library, or ``shape`` is not an MPOShape.

    Examples
    --------
    >>> import numpy as np
    >>> from_cores([np.ones((4, 2, 5)), np.ones((4, 3, 7))], "lroi")
    MPO(6×35, sites=2, bond_dims=(4,), num_params=124, dtype=float64, center_site=None)
    >>> from_cores([np.ones((1, 4, 1))], "l(oi)r", MPOShape((2,), (2,))).to_matrix()
    array([[1., 1.],
           [1., 1.]])
    """
    groups = _groups(axes)
    if not isinstance(cores, Iterable):
        raise InputError(f"expected a list of cores, got a {type(cores).__qualname__}")
    cores = list(cores)
    legs = _legs(shape, len(cores), axes)
    chain = [
        _in_own_order(core, groups, legs[site], site, len(cores)) for site, core in enumerate(cores)
    ]
    _check_bonds(chain, axes, [tuple(core.shape) for core in cores])
    return MPO(in_common_dtype(chain) if chain else chain, shape)


def _groups(axes: Any) -> list[str]:
    """Return the letters of every axis; raise an InputError unless they name the four axes."""
    groups = re.findall(r"\w|\((?:oi|io)\)", axes) if isinstance(axes, str) else []
    if "".join(groups) != axes or sorted(re.sub(r"[()]", "", axes)) != sorted(_OWN):
        meaning = ", ".join(f"{letter} ({name})" for letter, name in _NAMES.items())
        raise InputError(
            f"axes must hold each of {meaning} once, with both legs as (oi) or (io) if they share "
            f"an axis, got {short_repr(axes)}"
        )
    return [group.strip("()") for group in groups]


def _outermost(site: int, sites: int) -> set[str]:
    """Return the letters of a core's bonds that have no neighbour."""
    return {letter for letter, end in (("l", 0), ("r", sites - 1)) if site == end}


def _legs(shape: Any, sites: int, axes: str) -> list[dict[str, int]]:
    """Return the sizes of every site's legs; nothing where the cores tell them."""
    if shape is None:
        if "(" in axes:
            raise InputError(f"axes {axes!r} join the legs of a site: give the shape to split them")
        return [{}] * sites
    if not isinstance(shape, MPOShape):
        raise TypeError(f"expected an MPOShape, got {type(shape).__qualname__}")
    if shape.sites != sites:
        raise InputError(f"got {sites} cores for the {shape.sites} sites of {shape}")
    return [{"o": o, "i": i} for o, i in zip(shape.out_dims, shape.in_dims, strict=True)]


def _in_own_order(
    core: Array, groups: list[str], legs: dict[str, int], site: int, sites: int
) -> Array:
    """Return a core with the axes of an MPO's cores, in their order."""
    xp = get_backend(core)
    inner = [group for group in groups if group not in _outermost(site, sites)]
    if len(core.shape) not in (len(groups), len(inner)):
        names = ", ".join(" with ".join(_NAMES[letter] for letter in group) for group in groups)
        raise InputError(
            f"core {site} needs {len(groups)} axes ({names})"
            + (f" or, without outermost bonds, {len(inner)}" if inner != groups else "")
            + f", got shape {tuple(core.shape)}"
        )
    present = groups if len(core.shape) == len(groups) else inner
    if present == list(_OWN):
        return core
    sizes = dict.fromkeys(_OWN, 1)
    for group, size in zip(present, map(int, core.shape), strict=True):
        sizes |= {group: size} if len(group) == 1 else legs
        if prod(sizes[letter] for letter in group) != size:
            raise InputError(
                f"core {site} has {size} entries along the axis of its legs, and the shape has "
                f"output leg {legs['o']} times input leg {legs['i']}"
            )
    order = "".join(groups)
    full = core.reshape(*(sizes[letter] for letter in order))
    return xp.permute(full, [order.index(letter) for letter in _OWN])


def _check_bonds(chain: list[Array], axes: str, shapes: list[tuple[int, ...]]) -> None:
    """Raise an InputError unless the cores chain; the message has the shapes that were given."""
    rights = [1, *(int(core.shape[3]) for core in chain)]
    lefts = [*(int(core.shape[0]) for core in chain), 1]
    for site, (right, left) in enumerate(zip(rights, lefts, strict=True)):
        if right == left:
            continue
        if site == 0:
            found = f"the outermost bonds must be 1, and core 0 has left bond {left}"
        elif site == len(chain):
            found = f"the outermost bonds must be 1, and core {site - 1} has right bond {right}"
        else:
            found = f"core {site - 1} has right bond {right}, and core {site} left bond {left}"
        raise InputError(f"{found}: read as {axes!r}, the cores have shapes {shapes}")
