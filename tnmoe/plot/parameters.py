"""Pictures of parameters: the error of truncations against them, and the sizes of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from tnmoe.errors import InputError, check_positive_int
from tnmoe.plot.data import check_mapping, check_numbers
from tnmoe.plot.style import (
    COLORS,
    GREY,
    LOG_AXIS_RATIO,
    add_legend,
    distinct_labels,
    label_text,
    line_style,
    log_axis_with_zero,
    new_axes,
    rows_size,
    set_size_axis,
    short_count,
    start_at_zero,
)

if TYPE_CHECKING:
    from tnmoe.hf import ParameterReport

# Inches from the axis of bars to their legend.
_LEGEND_BELOW = 0.45
# Hatching distinguishes the parts of bars in greyscale.
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def error_against_parameters(
    truncations: Mapping[str, Sequence[Sequence[float]]],
    ax: Axes | None = None,
    dense: int | None = None,
) -> Axes:
    """Plot relative errors against parameters, with the guaranteed bounds as lighter lines.

    Parameters
    ----------
    truncations : mapping from str to sequence of (parameters, error) or (parameters, error, bound)
        Per series (a shape, a method, a matrix), its truncations in any order. Errors and bounds
        are relative to the norm of the matrix.
    ax : Axes, optional
    dense : int, optional
        Parameters of the matrix itself, which a vertical line marks.

    Raises
    ------
    InputError
        If there is no truncation, a number is negative or not finite, or a truncation has other
        than two or three numbers.

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
        name: _points(name, points)
        for name, points in check_mapping("truncations", truncations).items()
    }
    marked = [] if dense is None else [float(check_positive_int("dense", dense))]
    ax = new_axes(ax)
    labels, common = distinct_labels(tables)
    for index, (label, table) in enumerate(zip(labels, tables.values(), strict=True)):
        ax.plot(table[0], table[1], label=label, **line_style(index, 0))
    bounded = {index: table for index, table in enumerate(tables.values()) if len(table) == 3}
    for index, table in bounded.items():
        # A wide line: without padding, the line of the error lies on it.
        ax.plot(
            table[0], table[2], color=line_style(index, 0)["color"], alpha=0.3, linewidth=5,
            zorder=1, label="guaranteed bound (lighter)" if index == min(bounded) else None,
        )  # fmt: skip
    for size in marked:
        ax.axvline(size, color=GREY, linestyle=":", label=f"dense: {short_count(size)}")
    sizes = np.concatenate([marked, *(table[0] for table in tables.values())])
    heights = np.concatenate([table[1:].ravel() for table in tables.values()])
    set_size_axis(ax, sizes)
    _scale_errors(ax, heights)
    ax.set(xlabel="parameters", ylabel="relative error (Frobenius)", title="Error of truncations")
    add_legend(ax, common)
    return ax


def _points(name: str, points: Any) -> np.ndarray:
    """Return rows of parameters in ascending order, errors and, where given, bounds."""
    table = check_numbers(f"truncations[{name!r}]", points, axes=2, lowest=0)
    if table.shape[1] not in (2, 3):
        raise InputError(
            f"truncations[{name!r}] must hold (parameters, error) or (parameters, error, bound), "
            f"got a table of shape {table.shape}"
        )
    return table[np.argsort(table[:, 0], kind="stable")].T


def _scale_errors(ax: Axes, errors: np.ndarray) -> None:
    """Make the y-axis logarithmic if errors differ by a large factor; zero stays on the axis."""
    positive = errors[errors > 0]
    if positive.size and positive.max() > LOG_AXIS_RATIO * positive.min():
        if positive.size == errors.size:
            ax.set_yscale("log")
        else:
            log_axis_with_zero(ax, positive.min(), positive.max())
    else:
        start_at_zero(ax)


def parameter_bars(
    report: ParameterReport | Mapping[str, int | Mapping[str, int]], ax: Axes | None = None
) -> Axes:
    """Draw numbers of parameters as bars: dense, ordinary mixture and MPOE, or any other sizes.

    Parameters
    ----------
    report : ParameterReport, or mapping from str to int or to mapping from str to int
        A report of :func:`tnmoe.hf.parameter_report`, whose whole model is drawn in two parts:
        feed-forward networks and all else. Or sizes by name, each a number or in named parts.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is nothing to draw, or a size is negative or not finite.

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
    names, common = distinct_labels(bars)
    ax.set_yticks(range(len(bars)), names)
    ax.set(xlabel="parameters", ylabel=common or "", title="Parameters")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short_count(size)))
    ax.invert_yaxis()
    return ax


def _draw_parts(ax: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the parts of every bar in a row, each kind with its own colour and hatching."""
    kinds = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    left = np.zeros(len(bars))
    for index, kind in enumerate(kinds):
        widths = np.array([parts.get(kind, 0.0) for parts in bars.values()])
        ax.barh(
            range(len(bars)), widths, left=left, height=0.6, label=label_text(kind),
            edgecolor="white", color=COLORS[index % len(COLORS)],
            hatch=_HATCHES[index % len(_HATCHES)],
        )  # fmt: skip
        left += widths
    if len(kinds) > 1:
        # Below the axis and its label, where the legend hides no number.
        below = ScaledTranslation(0, -_LEGEND_BELOW, ax.figure.dpi_scale_trans)
        ax.legend(
            fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 0),
            bbox_transform=ax.transAxes + below, ncols=3, frameon=False,
        )  # fmt: skip


def _write_totals(ax: Axes, totals: Sequence[float]) -> None:
    """Write the size of every bar behind it, and how many times the first one it is."""
    for row, total in enumerate(totals):
        times = f" ({short_count(total / totals[0])}×)" if row and totals[0] else ""
        ax.annotate(
            short_count(total) + times, (total, row), xytext=(4, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    # Space for the numbers, and no frame that they would cross.
    ax.set_xlim(0, 1.3 * max(totals) or 1)
    ax.spines[["top", "right"]].set_visible(False)


def _bars(report: Any) -> dict[str, dict[str, float]]:
    """Return the parts of every bar with their sizes."""
    if hasattr(report, "ffns") and hasattr(report, "total"):
        report = {
            "dense": _parts(report, "dense"),
            f"MoE of {report.num_experts}": _parts(report, "moe"),
            "MPOE": _parts(report, "mpoe"),
        }
    bars = {}
    for name, sizes in check_mapping("report", report).items():
        parts = sizes if isinstance(sizes, Mapping) else {"": sizes}
        counts = check_numbers(f"report[{name!r}]", list(parts.values()), lowest=0)
        bars[name] = dict(zip(parts, counts.tolist(), strict=True))
    return bars


def _parts(report: ParameterReport, form: str) -> dict[str, int]:
    """Split one form of a model into feed-forward networks and all else."""
    networks = sum(getattr(count, form) for count in report.ffns)
    rest = getattr(report.total, form) - networks
    return {"feed-forward networks": networks, "all else": rest}
