"""Diagrams of tensor networks."""

from __future__ import annotations

from math import log2
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle

from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.plot.style import COLORS, GREY, new_axes
from tnmoe.shapes import MPOShape, resolve_center_site
from tnmoe.shared_mpo import SharedMPO

_AUXILIARY, _CENTRAL = COLORS[0], COLORS[1]
_COPY = "#7FB8D8"  # the auxiliary cores' colour, lighter

# All in units of the distance between two sites.
_NODE = 0.21  # half the width of a core
_LEG = 0.62  # from the middle of a core to the end of a leg
_SHIFT = 0.075  # from one core of a stack to the next
_LEFT, _RIGHT, _BOTTOM, _TOP = 1.05, 0.6, 0.9, 0.9  # margins around the outermost cores
_MIN_WIDTH = 4.2
# Cores in a stack, however many experts there are.
_MAX_STACK = 3
# Points of the labels.
_MIN_FONT, _MAX_FONT = 6.0, 10.0


def network(operator: MPOShape | MPO | SharedMPO, ax: Axes | None = None) -> Axes:
    """Draw an operator as a row of cores with their bonds and legs.

    Output legs point up and input legs down. A line is labelled with its dimension, and its width
    grows with the logarithm of the dimension; legs of size 1 are dotted. The central core is a
    square. The diagram of a mixture shows the shared central core once, and a stack of
    auxiliary cores, one per expert, at every other site.

    Parameters
    ----------
    operator : MPOShape, MPO or SharedMPO
        The operator to draw; a shape is drawn with its exact bonds.
    ax : Axes, optional
        Axes to draw on. The width of a new figure grows with the number of sites.

    Raises
    ------
    InputError
        If ``operator`` has another type.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> ax = network(MPOShape((4, 4, 8), (3, 4, 4)))
    >>> print(ax.get_title())
    128 × 48, 3 sites
    7,312 parameters
    """
    drawn = _describe(operator)
    sites = drawn.shape.sites
    ax = new_axes(ax, (max(4.8, sites + 1.2), 3.2))
    # A short row gets wider margins, so that its cores are not larger than those of a long row.
    spare = max(0.0, _MIN_WIDTH - (sites - 1 + _LEFT + _RIGHT)) / 2
    ax.set(xlim=(-_LEFT - spare, sites - 1 + _RIGHT + spare), ylim=(-_BOTTOM, _TOP), aspect="equal")
    ax.axis("off")
    pen = _Pen(ax)
    for bond, dim in enumerate(drawn.bonds):
        pen.line((bond, 0), (bond + 1, 0), dim)
        pen.text(bond + 0.5, -0.04 - _width(dim) / 2, str(dim), va="top")
    for site, (out, in_) in enumerate(zip(drawn.shape.out_dims, drawn.shape.in_dims, strict=True)):
        _draw_leg(pen, site, _LEG, out)
        _draw_leg(pen, site, -_LEG, in_)
        _draw_core(pen, site, site == drawn.center_site, drawn.experts)
    pen.text(-_LEFT, _LEG, "output legs", ha="left", va="center", color="0.35")
    pen.text(-_LEFT, -_LEG, "input legs", ha="left", va="center", color="0.35")
    _add_legend(ax, sites, drawn.experts)
    ax.set_title(_title(drawn), fontsize="medium")
    return ax


class _Network(NamedTuple):
    """The facts about an operator that its diagram shows; no experts for a single operator."""

    shape: MPOShape
    bonds: tuple[int, ...]
    center_site: int
    experts: int | None
    num_params: int


def _describe(operator: MPOShape | MPO | SharedMPO) -> _Network:
    """Gather the facts that the diagram shows."""
    if isinstance(operator, MPOShape):
        return _Network(
            operator, operator.bond_dims(), operator.center_site, None, operator.num_params()
        )
    if isinstance(operator, MPO):
        center_site = resolve_center_site(operator.shape, operator.center_site)
        return _Network(operator.shape, operator.bond_dims, center_site, None, operator.num_params)
    if isinstance(operator, SharedMPO):
        return _Network(
            operator.shape, operator.bond_dims, operator.center_site, operator.num_experts,
            operator.num_params,
        )  # fmt: skip
    raise InputError(
        f"network draws an MPOShape, an MPO or a SharedMPO, got {type(operator).__qualname__}"
    )


class _Pen:
    """Axes to draw on, with lines and letters in proportion to the distance between two sites."""

    def __init__(self, ax: Axes) -> None:
        self.ax = ax
        box, (left, right) = ax.get_window_extent(), ax.get_xlim()
        pixels = min(box.width / (right - left), box.height / (_BOTTOM + _TOP))
        self._points_per_site = pixels * 72 / ax.figure.dpi

    def line(self, start: tuple[float, float], end: tuple[float, float], dim: int) -> None:
        """Draw a bond or leg of a dimension."""
        x, y = zip(start, end, strict=True)
        style: dict[str, Any] = {"color": "black"}
        if dim == 1:
            style = {"color": GREY, "linestyle": ":"}
        width = self._points_per_site * _width(dim)
        self.ax.plot(x, y, linewidth=width, zorder=1, solid_capstyle="butt", **style)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write a text, centred and black unless the style says otherwise."""
        size = min(max(_MIN_FONT, 0.14 * self._points_per_site), _MAX_FONT)
        self.ax.text(x, y, text, **{"fontsize": size, "ha": "center", "color": "black", **style})


def _draw_core(pen: _Pen, site: int, central: bool, experts: int | None) -> None:
    """Draw a square for the central core, and a circle or a stack for an auxiliary one."""
    if central:
        corner = (site - _NODE, -_NODE)
        core: Patch = Rectangle(corner, 2 * _NODE, 2 * _NODE, facecolor=_CENTRAL)
    else:
        core = Circle((site, 0), _NODE, facecolor=_AUXILIARY)
        if experts is not None:
            _draw_stack(pen, site, experts)
    core.set(edgecolor="white", zorder=3)
    pen.ax.add_patch(core)
    pen.text(site, 0, str(site), va="center", color="white", zorder=4)


def _draw_stack(pen: _Pen, site: int, experts: int) -> None:
    """Draw the cores behind the first expert's core, and the number of experts."""
    copies = min(experts, _MAX_STACK) - 1
    for copy in range(copies, 0, -1):
        middle = (site + copy * _SHIFT, copy * _SHIFT)
        pen.ax.add_patch(Circle(middle, _NODE, facecolor=_COPY, edgecolor="white", zorder=2))
    edge = _NODE + copies * _SHIFT
    pen.text(site + 0.85 * edge, 0.9 * edge, f"×{experts}", ha="left", va="bottom")


def _draw_leg(pen: _Pen, site: int, end: float, dim: int) -> None:
    """Draw a leg from the core up or down, with its dimension at the end."""
    pen.line((site, 0), (site, end), dim)
    if dim > 1:
        up = end > 0
        pen.text(site, end + (0.03 if up else -0.03), str(dim), va="bottom" if up else "top")


def _width(dim: int) -> float:
    """Return the width of a line, which grows with the logarithm of its dimension."""
    return 0.012 + 0.007 * log2(dim)


def _add_legend(ax: Axes, sites: int, experts: int | None) -> None:
    """Explain squares and circles below the diagram."""
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


def _title(drawn: _Network) -> str:
    """Name the size of the operator and count its parameters."""
    size = f"{drawn.shape.out_features} × {drawn.shape.in_features}"
    if drawn.experts is not None:
        size = f"{drawn.experts} experts of {size}"
    sites = "1 site" if drawn.shape.sites == 1 else f"{drawn.shape.sites} sites"
    return f"{size}, {sites}\n{drawn.num_params:,} parameters"
