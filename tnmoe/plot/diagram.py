"""Networks of cores as diagrams."""

from __future__ import annotations

from math import log2
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle

from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.plot.style import COLORS, GREY, new_axes
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO

_AUXILIARY, _CENTRAL = COLORS[0], COLORS[1]
_COPY = "#7FB8D8"  # the auxiliary cores' colour, lighter

# All in units of the distance between two sites.
_NODE = 0.21  # half the width of a core
_LEG = 0.62  # from the middle of a core to the end of a leg
_SHIFT = 0.075  # from one core of a stack to the next
_LEFT, _RIGHT, _BOTTOM, _TOP = 1.05, 0.6, 0.9, 0.9
_LEAST_WIDTH = 4.2


def network(operator: MPOShape | MPO | SharedMPO, ax: Axes | None = None) -> Axes:
    """Diagram of an operator: cores in a row, joined by bonds, with their legs.

    Output legs point up and input legs down. Lines are labelled with their dimensions and grow
    wider with the logarithm of those; legs of size 1 are dotted. The central core is a square. In a
    mixture it is drawn once, and the cores that every expert has of its own are stacks.

    Parameters
    ----------
    operator : MPOShape, MPO or SharedMPO
        A shape is drawn with its exact bonds.
    ax : Axes, optional
        A new figure's grow with the number of sites.

    Raises
    ------
    InputError
        If ``operator`` is none of these.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> ax = network(MPOShape((4, 4, 8), (3, 4, 4)))
    >>> print(ax.get_title())
    128 × 48, 3 sites
    7,312 parameters
    """
    shape, bonds, center_site, experts, params = _read(operator)
    ax = new_axes(ax, (max(4.8, shape.sites + 1.2), 3.2))
    # Short rows get room at their sides and are not drawn larger than others.
    spare = max(0.0, _LEAST_WIDTH - (shape.sites - 1 + _LEFT + _RIGHT)) / 2
    xlim = (-_LEFT - spare, shape.sites - 1 + _RIGHT + spare)
    ax.set(xlim=xlim, ylim=(-_BOTTOM, _TOP), aspect="equal")
    ax.axis("off")
    unit = _points_per_site(ax)
    for bond, dim in enumerate(bonds):
        _line(ax, (bond, 0), (bond + 1, 0), dim, unit)
        _text(ax, bond + 0.5, -0.04 - _width(dim) / 2, str(dim), unit, va="top")
    for site, (out, in_) in enumerate(zip(shape.out_dims, shape.in_dims, strict=True)):
        _leg(ax, site, _LEG, out, unit)
        _leg(ax, site, -_LEG, in_, unit)
        _core(ax, site, site == center_site, experts, unit)
    _text(ax, -_LEFT, _LEG, "output legs", unit, ha="left", va="center", color="0.35")
    _text(ax, -_LEFT, -_LEG, "input legs", unit, ha="left", va="center", color="0.35")
    _legend(ax, shape.sites, experts)
    ax.set_title(_title(shape, experts, params), fontsize="medium")
    return ax


def _read(
    operator: MPOShape | MPO | SharedMPO,
) -> tuple[MPOShape, tuple[int, ...], int, int | None, int]:
    """Shape, bonds, centre, number of experts (None for one operator) and of parameters."""
    if isinstance(operator, MPOShape):
        return operator, operator.bond_dims(), operator.center_site, None, operator.num_params()
    if isinstance(operator, MPO):
        shape = operator.shape
        center_site = shape.center_site if operator.center_site is None else operator.center_site
        return shape, operator.bond_dims, center_site, None, operator.num_params
    if isinstance(operator, SharedMPO):
        return (
            operator.shape, operator.bond_dims, operator.center_site, operator.num_experts,
            operator.num_params,
        )  # fmt: skip
    raise InputError(
        f"network draws an MPOShape, an MPO or a SharedMPO, got {type(operator).__qualname__}"
    )


def _points_per_site(ax: Axes) -> float:
    """Distance between two sites on paper."""
    box, (left, right) = ax.get_window_extent(), ax.get_xlim()
    per_unit = min(box.width / (right - left), box.height / (_BOTTOM + _TOP))
    return per_unit * 72 / ax.figure.dpi


def _core(ax: Axes, site: int, central: bool, experts: int | None, unit: float) -> None:
    """A square for the central core; a circle for an auxiliary one, or a stack of them."""
    if central:
        corner = (site - _NODE, -_NODE)
        core: Patch = Rectangle(corner, 2 * _NODE, 2 * _NODE, facecolor=_CENTRAL)
    else:
        core = Circle((site, 0), _NODE, facecolor=_AUXILIARY)
        if experts is not None:
            _stack(ax, site, experts, unit)
    core.set(edgecolor="white", zorder=3)
    ax.add_patch(core)
    _text(ax, site, 0, str(site), unit, va="center", color="white", zorder=4)


def _stack(ax: Axes, site: int, experts: int, unit: float) -> None:
    """What stands behind the first expert's core: up to two more, and how many they are."""
    copies = min(experts, 3) - 1
    for copy in range(copies, 0, -1):
        middle = (site + copy * _SHIFT, copy * _SHIFT)
        ax.add_patch(Circle(middle, _NODE, facecolor=_COPY, edgecolor="white", zorder=2))
    edge = _NODE + copies * _SHIFT
    _text(ax, site + 0.85 * edge, 0.9 * edge, f"×{experts}", unit, ha="left", va="bottom")


def _leg(ax: Axes, site: int, end: float, dim: int, unit: float) -> None:
    """A leg from the core up or down, with its dimension at the end."""
    _line(ax, (site, 0), (site, end), dim, unit)
    if dim > 1:
        up = end > 0
        _text(ax, site, end + (0.03 if up else -0.03), str(dim), unit, va="bottom" if up else "top")


def _width(dim: int) -> float:
    """Width of a line, which grows with the logarithm of its dimension."""
    return 0.012 + 0.007 * log2(dim)


def _line(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], dim: int, unit: float
) -> None:
    x, y = zip(start, end, strict=True)
    style: dict[str, Any] = {"color": GREY, "linestyle": ":"} if dim == 1 else {"color": "black"}
    ax.plot(x, y, linewidth=unit * _width(dim), zorder=1, solid_capstyle="butt", **style)


def _text(ax: Axes, x: float, y: float, text: str, unit: float, **where: Any) -> None:
    size = min(max(6.0, 0.14 * unit), 10.0)
    ax.text(x, y, text, **{"fontsize": size, "ha": "center", "color": "black", **where})


def _legend(ax: Axes, sites: int, experts: int | None) -> None:
    """What squares and circles are, below the diagram."""
    names = [("central core", "s", _CENTRAL), ("auxiliary cores", "o", _AUXILIARY)]
    if experts is not None:
        names = [
            ("central core, shared", "s", _CENTRAL),
            ("auxiliary cores, one per expert", "o", _AUXILIARY),
        ]
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", markersize=8, label=name)
        for name, marker, color in names[: min(sites, 2)]
    ]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False,
        fontsize="small",
    )  # fmt: skip


def _title(shape: MPOShape, experts: int | None, params: int) -> str:
    size = f"{shape.out_features} × {shape.in_features}"
    if experts is not None:
        size = f"{experts} experts of {size}"
    sites = "1 site" if shape.sites == 1 else f"{shape.sites} sites"
    return f"{size}, {sites}\n{params:,} parameters"
