"""What parameters buy: the error of truncations, and the sizes of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from tnmoe.errors import InputError, positive_int
from tnmoe.plot.data import named, numbers
from tnmoe.plot.style import (
    COLORS,
    FAR_APART,
    GREY,
    add_legend,
    decades_and_zero,
    from_zero,
    line_style,
    new_axes,
    rows_size,
    scale_sizes,
    short,
    shown,
    shown_apart,
)

if TYPE_CHECKING:
    from tnmoe.hf import ParameterReport

# Inches from the axis of bars to their legend.
_LEGEND_BELOW = 0.45
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def error_against_parameters(
    truncations: Mapping[str, Sequence[Sequence[float]]],
    ax: Axes | None = None,
    dense: int | None = None,
) -> Axes:
    """Relative error against parameters, each with the guaranteed bound as a lighter line.

    Parameters
    ----------
    truncations : mapping from str to sequence of (parameters, error) or (parameters, error, bound)
        Per series (a shape, a method, a matrix) its truncations, in any order; error and bound
        relative to the norm of the matrix.
    ax : Axes, optional
    dense : int, optional
        Parameters of the matrix itself, marked by a vertical line.

    Raises
    ------
    InputError
        If there is no truncation, or numbers are not finite, negative, or not two or three per
        truncation.

    Examples
    --------
    >>> import numpy as np
    >>> import tnmoe as tn
    >>> matrix = np.random.default_rng(0).standard_normal((64, 64))
    >>> norm, points = np.linalg.norm(matrix), []
    >>> for bond in (8, 32, 128):
    ...     shape = tn.MPOShape((4, 4, 4), (4, 4, 4))
    ...     mpo, info = tn.decompose(matrix, shape, max_bond=bond, return_info=True)
    ...     error = np.linalg.norm(matrix - mpo.to_matrix())
    ...     points.append((mpo.num_params, error / norm, info.error_bound / norm))
    >>> ax = error_against_parameters({"4·4·4": points}, dense=matrix.size)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('parameters', 'relative error (Frobenius)')
    """
    tables = {
        name: _points(name, points) for name, points in named("truncations", truncations).items()
    }
    marked = [] if dense is None else [float(positive_int("dense", dense))]
    ax = new_axes(ax)
    labels, common = shown_apart(tables)
    for index, (label, table) in enumerate(zip(labels, tables.values(), strict=True)):
        ax.plot(table[0], table[1], label=label, **line_style(index, 0))
    bounded = {index: table for index, table in enumerate(tables.values()) if len(table) == 3}
    for index, table in bounded.items():
        # Wide, since without padding the error lies on it.
        ax.plot(
            table[0], table[2], color=line_style(index, 0)["color"], alpha=0.3, linewidth=5,
            zorder=1, label="guaranteed bound (lighter)" if index == min(bounded) else None,
        )  # fmt: skip
    for size in marked:
        ax.axvline(size, color=GREY, linestyle=":", label=f"dense: {short(size)}")
    sizes = np.concatenate([marked, *(table[0] for table in tables.values())])
    heights = np.concatenate([table[1:].ravel() for table in tables.values()])
    scale_sizes(ax, sizes)
    _scale_errors(ax, heights)
    ax.set(xlabel="parameters", ylabel="relative error (Frobenius)", title="Error of truncations")
    add_legend(ax, common)
    return ax


def _points(name: str, points: Any) -> np.ndarray:
    """Rows: parameters in ascending order, errors and, if they are given, bounds."""
    table = numbers(f"truncations[{name!r}]", points, axes=2, lowest=0)
    if table.shape[1] not in (2, 3):
        raise InputError(
            f"truncations[{name!r}] must be (parameters, error) or (parameters, error, bound) "
            f"each, got a table of shape {table.shape}"
        )
    return table[np.argsort(table[:, 0], kind="stable")].T


def _scale_errors(ax: Axes, errors: np.ndarray) -> None:
    """A logarithmic y-axis for errors far apart, on which an error of 0 has its place too."""
    positive = errors[errors > 0]
    if positive.size and positive.max() > FAR_APART * positive.min():
        if positive.size == errors.size:
            ax.set_yscale("log")
        else:
            decades_and_zero(ax, positive.min(), positive.max())
    else:
        from_zero(ax)


def parameter_bars(
    report: ParameterReport | Mapping[str, int | Mapping[str, int]], ax: Axes | None = None
) -> Axes:
    """Parameters as bars: dense, ordinary mixture and MPOE, or whatever else has sizes.

    Parameters
    ----------
    report : ParameterReport, or mapping from str to int or to mapping from str to int
        What :func:`tnmoe.hf.parameter_report` returns: its whole model is drawn, feed-forward
        networks apart from the rest. Or sizes by name, whole or in named parts.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is nothing to draw, or a size is no finite number of at least 0.

    Examples
    --------
    >>> ax = parameter_bars({"dense": 4722432, "MoE of 8": 37785600, "MPOE": 7710976})
    >>> [text.get_text() for text in ax.texts]
    ['4.72 M', '37.8 M (8×)', '7.71 M (1.63×)']
    """
    bars = _bars(report)
    ax = new_axes(ax, rows_size(len(bars)))
    _draw_parts(ax, bars)
    _write_totals(ax, [sum(parts.values()) for parts in bars.values()])
    names, common = shown_apart(bars)
    ax.set_yticks(range(len(bars)), names)
    ax.set(xlabel="parameters", ylabel=common or "", title="Parameters")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))
    ax.invert_yaxis()
    return ax


def _draw_parts(ax: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of parts in a row, each kind in its colour and hatching."""
    kinds = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    left = np.zeros(len(bars))
    for index, kind in enumerate(kinds):
        widths = np.array([parts.get(kind, 0.0) for parts in bars.values()])
        ax.barh(
            range(len(bars)), widths, left=left, height=0.6, label=shown(kind), edgecolor="white",
            color=COLORS[index % len(COLORS)], hatch=_HATCHES[index % len(_HATCHES)],
        )  # fmt: skip
        left += widths
    if len(kinds) > 1:
        # Below the axis and its label, where it hides no number.
        below = ScaledTranslation(0, -_LEGEND_BELOW, ax.figure.dpi_scale_trans)
        ax.legend(
            fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 0),
            bbox_transform=ax.transAxes + below, ncols=3, frameon=False,
        )  # fmt: skip


def _write_totals(ax: Axes, totals: Sequence[float]) -> None:
    """Sizes behind the bars, with how many times the first they are."""
    for row, total in enumerate(totals):
        times = f" ({short(total / totals[0])}×)" if row and totals[0] else ""
        ax.annotate(
            short(total) + times, (total, row), xytext=(4, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    # Room for them, and no frame for them to cross.
    ax.set_xlim(0, 1.3 * max(totals) or 1)
    ax.spines[["top", "right"]].set_visible(False)


def _bars(report: Any) -> dict[str, dict[str, float]]:
    """Parts and their sizes, per bar."""
    if hasattr(report, "ffns") and hasattr(report, "total"):
        report = {
            "dense": _parts(report, "dense"),
            f"MoE of {report.num_experts}": _parts(report, "moe"),
            "MPOE": _parts(report, "mpoe"),
        }
    bars = {}
    for name, sizes in named("report", report).items():
        parts = sizes if isinstance(sizes, Mapping) else {"": sizes}
        counts = numbers(f"report[{name!r}]", list(parts.values()), lowest=0)
        bars[name] = dict(zip(parts, counts.tolist(), strict=True))
    return bars


def _parts(report: ParameterReport, form: str) -> dict[str, int]:
    """One form of a model in two parts."""
    networks = sum(getattr(count, form) for count in report.ffns)
    rest = getattr(report.total, form) - networks
    return {"feed-forward networks": networks, "all else": rest}
