"""Pictures of routing: the load of experts per layer and over time, and routers' statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, check_number_in, check_one_of
from tnmoe.options import Statistic
from tnmoe.plot.data import check_mapping, check_numbers
from tnmoe.plot.style import (
    add_legend,
    distinct_labels,
    integer_ticks,
    label_text,
    line_style,
    new_axes,
    rows_size,
)

# A heat map of at most this many experts and layers shows its shares as numbers in the cells.
_MAX_LABELLED = (16, 24)
# Shares in half precision do not quite sum to 1.
_ROUNDING = 0.02
# The largest number of columns of a heat map over time.
_MAX_COLUMNS = 250


def expert_load(load: Any, ax: Axes | None = None, brightest: float | None = None) -> Axes:
    """Draw a heat map of the load per layer and expert: the share of slots.

    Parameters
    ----------
    load : array, shape (layers, E)
        Shares. Every row sums to 1, or to less where the layer dropped slots.
    ax : Axes, optional
    brightest : float, optional
        Share at the bright end of the colours; set it to compare pictures. By default the largest
        share, but at least twice the balanced one.

    Raises
    ------
    InputError
        If ``load`` is not a table of numbers from 0 to 1.

    Examples
    --------
    >>> ax = expert_load([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    >>> [text.get_text() for text in ax.texts]
    ['50%', '30%', '20%', '10%', '10%', '80%']
    """
    load = check_numbers("load", load, axes=2, lowest=0)
    if load.sum(1).max() > 1 + _ROUNDING:
        raise InputError(
            "load must hold shares, and no row may sum to more than 1: divide counts by their "
            f"sums, got {load[load.sum(1).argmax()]}"
        )
    layers, experts = load.shape
    ax = new_axes(ax, rows_size(layers))
    balanced = 1 / experts
    if brightest is None:
        brightest = _brightest(load)
    brightest = check_number_in("brightest", brightest, "(0, inf)")
    image = ax.imshow(load, vmin=0, vmax=brightest, cmap="viridis", aspect="auto")
    if experts <= _MAX_LABELLED[0] and layers <= _MAX_LABELLED[1]:
        for (layer, expert), share in np.ndenumerate(load):
            dark = share < brightest / 2
            ax.text(
                expert, layer, f"{share:.0%}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    else:
        ax.figure.colorbar(image, ax=ax, label="share of slots")
    ax.set(xlabel="expert", ylabel="layer", title=f"Load per expert (balanced: {balanced:.1%})")
    integer_ticks(ax.xaxis)
    integer_ticks(ax.yaxis)
    return ax


def routing_statistic(
    history: Mapping[str, Mapping[str, Any]],
    statistic: Statistic = "max_violation",
    ax: Axes | None = None,
) -> Axes:
    """Plot one statistic of every router against steps.

    Parameters
    ----------
    history : RoutingHistory, or mapping from str to mapping from str to array
        Per router, arrays of statistics over steps. NaN and infinity leave gaps.
    statistic : {"max_violation", "entropy", "dropped", "untouched"}
        The statistic to plot.
    ax : Axes, optional

    Raises
    ------
    InputError
        If nothing was recorded, or the statistic is not one number per step.

    Examples
    --------
    >>> ax = routing_statistic({"router": {"entropy": [1.4, 1.2, 1.3]}}, "entropy")
    >>> ax.get_ylabel()
    'entropy (nats)'
    """
    series = _series(history, statistic, axes=1, gaps=True)
    ax = new_axes(ax)
    labels, common = distinct_labels(name or "router" for name in series)
    for index, (label, values) in enumerate(zip(labels, series.values(), strict=True)):
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, label=label, **line_style(index, len(values)))
    unit = " (nats)" if statistic == "entropy" else ""
    ax.set(xlabel="step", ylabel=statistic.replace("_", " ") + unit, title="Routers in training")
    integer_ticks(ax.xaxis)
    add_legend(ax, common)
    return ax


def load_history(
    history: Mapping[str, Mapping[str, Any]], router: str, ax: Axes | None = None
) -> Axes:
    """Draw a heat map of one router's load per expert against steps.

    A column is one step. Where there are more than 250 steps, a column is the mean of several.

    Parameters
    ----------
    history : RoutingHistory, or mapping from str to mapping from str to array
        Per router, arrays of statistics over steps.
    router : str
        Name of the router.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is no record of the router.

    Examples
    --------
    >>> ax = load_history({"router": {"load": [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]}}, "router")
    >>> ax.images[0].get_array().shape
    (2, 3)
    """
    load = _series(history, "load", axes=2, routers=[router])[router]
    steps, experts = load.shape
    ax = new_axes(ax, rows_size(experts))
    block = -(-steps // _MAX_COLUMNS)
    means = _block_means(load, block)
    image = ax.imshow(
        means.T, vmin=0, vmax=_brightest(means), cmap="viridis", interpolation="nearest",
        aspect="auto", origin="lower", extent=(0.5, len(means) * block + 0.5, -0.5, experts - 0.5),
    )  # fmt: skip
    ax.set_xlim(0.5, steps + 0.5)
    ax.figure.colorbar(image, ax=ax, label="share of slots")
    title = f"Load of {label_text(router or 'the router')} (balanced: {1 / experts:.1%})"
    ax.set(xlabel="step", ylabel="expert", title=title)
    integer_ticks(ax.xaxis)
    integer_ticks(ax.yaxis)
    return ax


def _brightest(load: np.ndarray) -> float:
    """Return the share at the bright end: the largest, but at least twice the balanced one."""
    return max(2 / load.shape[1], float(load.max()))


def _block_means(load: np.ndarray, block: int) -> np.ndarray:
    """Return means over blocks of steps; the last block may be shorter."""
    starts = np.arange(0, len(load), block)
    lengths = np.diff([*starts, len(load)])
    return np.add.reduceat(load, starts) / lengths[:, None]


def _has_axes(values: Any, axes: int) -> bool:
    """Check the number of axes; pass rows of different lengths, which ``check_numbers`` refuses."""
    try:
        return np.ndim(values) == axes
    except ValueError:
        return True


def _series(
    history: Mapping[str, Mapping[str, Any]],
    statistic: str,
    axes: int,
    routers: Sequence[str] | None = None,
    gaps: bool = False,
) -> dict[str, np.ndarray]:
    """Return a statistic over steps for each router, with the given number of axes."""
    names = list(history) if routers is None else routers
    if not names or any(name not in list(history) for name in names):
        raise InputError(f"routers {names} were not recorded, only {list(history)}")
    series = {name: check_mapping(f"history[{name!r}]", history[name]) for name in names}
    for values in series.values():
        known = [key for key, value in values.items() if _has_axes(value, axes)]
        check_one_of("statistic", statistic, known)
    return {
        name: check_numbers(f"{statistic} of {name!r}", values[statistic], axes, gaps=gaps)
        for name, values in series.items()
    }
