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

# Cores that experts own and that they share; of a single operator, auxiliary and central cores.
_OWNED, _SHARED = COLORS[0], COLORS[1]
_COPY = "#7FB8D8"  # the colour of owned cores, lighter

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
    square. The diagram of a mixture shows a shared core once, and a stack of cores, one per expert,
    at every site that experts own. A base stands left of the chain that is added to it.

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
    row = _row_of(operator)
    sites = row.sites
    ax = new_axes(ax, (max(4.8, sites + 1.2), 3.2))
    # A short row gets wider margins, so that its cores are not larger than those of a long row.
    spare = max(0.0, _MIN_WIDTH - (sites - 1 + _LEFT + _RIGHT)) / 2
    ax.set(xlim=(-_LEFT - spare, sites - 1 + _RIGHT + spare), ylim=(-_BOTTOM, _TOP), aspect="equal")
    ax.axis("off")
    pen = _Pen(ax)
    for chain in row.chains:
        _draw_chain(pen, chain, row.experts)
    if len(row.chains) > 1:
        pen.text(-_LEFT, 0, "base", ha="left", va="center", color="0.35")
        pen.text(row.chains[1].start - 0.5, 0, "+", va="center")
    pen.text(-_LEFT, _LEG, "output legs", ha="left", va="center", color="0.35")
    pen.text(-_LEFT, -_LEG, "input legs", ha="left", va="center", color="0.35")
    _add_legend(ax, row)
    ax.set_title(_title(operator, row), fontsize="medium")
    return ax


class _Chain(NamedTuple):
    """A chain in the row: where it starts, and the facts that its drawing shows."""

    start: int
    shape: MPOShape
    bonds: tuple[int, ...]
    center_site: int
    owned: frozenset[int] = frozenset()  # sites whose cores experts own


class _Row(NamedTuple):
    """The chains of a diagram, left to right; no experts for a single operator."""

    chains: tuple[_Chain, ...]
    experts: int | None = None

    @property
    def sites(self) -> int:
        return sum(chain.shape.sites for chain in self.chains)


def _row_of(operator: MPOShape | MPO | SharedMPO) -> _Row:
    """Gather the facts that the diagram shows."""
    if isinstance(operator, MPOShape):
        return _Row((_Chain(0, operator, operator.bond_dims(), operator.center_site),))
    if isinstance(operator, MPO):
        center_site = resolve_center_site(operator.shape, operator.center_site)
        return _Row((_Chain(0, operator.shape, operator.bond_dims, center_site),))
    if isinstance(operator, SharedMPO):
        base = () if operator.base is None else _row_of(operator.base).chains
        owned = frozenset(range(operator.shape.sites)) - operator.shared_sites
        chain = _Chain(
            sum(each.shape.sites for each in base), operator.shape, operator.bond_dims,
            operator.center_site, owned,
        )  # fmt: skip
        return _Row((*base, chain), operator.num_experts)
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


def _draw_chain(pen: _Pen, chain: _Chain, experts: int | None) -> None:
    """Draw the bonds, legs and cores of a chain."""
    for bond, dim in enumerate(chain.bonds, start=chain.start):
        pen.line((bond, 0), (bond + 1, 0), dim)
        pen.text(bond + 0.5, -0.04 - _width(dim) / 2, str(dim), va="top")
    for site, (out, in_) in enumerate(zip(chain.shape.out_dims, chain.shape.in_dims, strict=True)):
        x = chain.start + site
        _draw_leg(pen, x, _LEG, out)
        _draw_leg(pen, x, -_LEG, in_)
        central, shared = site == chain.center_site, site not in chain.owned
        if not shared and experts is not None:
            _draw_stack(pen, x, central, experts)
        pen.ax.add_patch(_patch(x, 0, central, _color(central, shared, experts), zorder=3))
        pen.text(x, 0, str(site), va="center", color="white", zorder=4)


def _color(central: bool, shared: bool, experts: int | None) -> str:
    """Return the colour of a core."""
    return _SHARED if (central if experts is None else shared) else _OWNED


def _patch(x: float, y: float, central: bool, color: str, zorder: int) -> Patch:
    """Return a square for the central core, or a circle for an auxiliary one."""
    style: dict[str, Any] = {"facecolor": color, "edgecolor": "white", "zorder": zorder}
    if central:
        return Rectangle((x - _NODE, y - _NODE), 2 * _NODE, 2 * _NODE, **style)
    return Circle((x, y), _NODE, **style)


def _draw_stack(pen: _Pen, x: float, central: bool, experts: int) -> None:
    """Draw the cores behind the first expert's core, and the number of experts."""
    copies = min(experts, _MAX_STACK) - 1
    for copy in range(copies, 0, -1):
        shift = copy * _SHIFT
        pen.ax.add_patch(_patch(x + shift, shift, central, _COPY, zorder=2))
    edge = _NODE + copies * _SHIFT
    right, top = (edge, edge) if central else (0.85 * edge, 0.9 * edge)
    pen.text(x + right, top, f"×{experts}", ha="left", va="bottom")


def _draw_leg(pen: _Pen, x: float, end: float, dim: int) -> None:
    """Draw a leg from the core up or down, with its dimension at the end."""
    pen.line((x, 0), (x, end), dim)
    if dim > 1:
        up = end > 0
        pen.text(x, end + (0.03 if up else -0.03), str(dim), va="bottom" if up else "top")


def _width(dim: int) -> float:
    """Return the width of a line, which grows with the logarithm of its dimension."""
    return 0.012 + 0.007 * log2(dim)


def _add_legend(ax: Axes, row: _Row) -> None:
    """Explain squares, circles and colours below the diagram."""
    present = {
        (site == chain.center_site, site not in chain.owned)
        for chain in row.chains
        for site in range(chain.shape.sites)
    }
    handles = []
    for central, shared in sorted(present, reverse=True):
        name, marker = ("central core", "s") if central else ("auxiliary cores", "o")
        if row.experts is not None:
            name += ", shared" if shared else ", one per expert"
        color = _color(central, shared, row.experts)
        handles.append(
            Line2D([], [], color=color, marker=marker, ls="none", markersize=8, label=name)
        )
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False,
        fontsize="small",
    )  # fmt: skip


def _title(operator: MPOShape | MPO | SharedMPO, row: _Row) -> str:
    """Name the size of the operator and count its parameters."""
    shape = row.chains[-1].shape
    size = f"{shape.out_features} × {shape.in_features}"
    if row.experts is not None:
        size = f"{row.experts} experts of {size}"
    sites = "1 site" if shape.sites == 1 else f"{shape.sites} sites"
    base = " and a base" if len(row.chains) > 1 else ""
    num_params = operator.num_params
    count = num_params() if callable(num_params) else num_params
    return f"{size}, {sites}{base}\n{count:,} parameters"
