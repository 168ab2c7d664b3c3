"""How routers use their experts: load per expert and layer, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, number_in, one_of
from tnmoe.options import Statistic
from tnmoe.plot.data import named, numbers
from tnmoe.plot.style import (
    add_legend,
    count_on,
    line_style,
    new_axes,
    rows_size,
    shown,
    shown_apart,
)

# Up to so many experts and layers, shares are written into the cells of a heat map.
_MOST_WRITTEN = (16, 24)
# Shares in half precision do not quite sum to 1.
_ROUNDING = 0.02
# A heat map over time has so many columns at most.
_MOST_STEPS = 250


def expert_load(load: Any, ax: Axes | None = None, brightest: float | None = None) -> Axes:
    """Heat map of the share of tokens per layer and expert.

    Parameters
    ----------
    load : array, shape (layers, E)
        Shares; every row sums to 1, or to less where tokens were dropped.
    ax : Axes, optional
    brightest : float, optional
        Share at the bright end of the colours, for pictures that are to be compared; by default
        the largest, but at least twice the balanced one.

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
    load = numbers("load", load, axes=2, lowest=0)
    if load.sum(1).max() > 1 + _ROUNDING:
        raise InputError(
            "load must be shares, of which no row sums to more than 1: divide counts by their "
            f"sums, got {load[load.sum(1).argmax()]}"
        )
    layers, experts = load.shape
    ax = new_axes(ax, rows_size(layers))
    balanced = 1 / experts
    if brightest is None:
        brightest = _brightest(load)
    brightest = number_in("brightest", brightest, "(0, inf)")
    image = ax.imshow(load, vmin=0, vmax=brightest, cmap="viridis", aspect="auto")
    if experts <= _MOST_WRITTEN[0] and layers <= _MOST_WRITTEN[1]:
        for (layer, expert), share in np.ndenumerate(load):
            dark = share < brightest / 2
            ax.text(
                expert, layer, f"{share:.0%}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    else:
        ax.figure.colorbar(image, ax=ax, label="share of tokens")
    ax.set(xlabel="expert", ylabel="layer", title=f"Load per expert (balanced: {balanced:.1%})")
    count_on(ax.xaxis)
    count_on(ax.yaxis)
    return ax


def routing_statistic(
    history: Mapping[str, Mapping[str, Any]],
    statistic: Statistic = "max_violation",
    ax: Axes | None = None,
) -> Axes:
    """One statistic of every router against steps.

    Parameters
    ----------
    history : RoutingHistory, or mapping from str to mapping from str to array
        Per router, arrays of statistics over steps. NaN and infinity leave gaps.
    statistic : {"max_violation", "entropy", "dropped", "untouched"}
        Which one.
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
    labels, common = shown_apart(name or "router" for name in series)
    for index, (label, values) in enumerate(zip(labels, series.values(), strict=True)):
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, label=label, **line_style(index, len(values)))
    unit = " (nats)" if statistic == "entropy" else ""
    ax.set(xlabel="step", ylabel=statistic.replace("_", " ") + unit, title="Routers in training")
    count_on(ax.xaxis)
    add_legend(ax, common)
    return ax


def load_history(
    history: Mapping[str, Mapping[str, Any]], router: str, ax: Axes | None = None
) -> Axes:
    """Heat map of one router's load per expert against steps.

    A column is one step, or the mean of several where there are more than 250.

    Parameters
    ----------
    history : RoutingHistory, or mapping from str to mapping from str to array
        Per router, arrays of statistics over steps.
    router : str
        Which one.
    ax : Axes, optional

    Raises
    ------
    InputError
        If that router was not recorded.

    Examples
    --------
    >>> ax = load_history({"router": {"load": [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]}}, "router")
    >>> ax.images[0].get_array().shape
    (2, 3)
    """
    load = _series(history, "load", axes=2, routers=[router])[router]
    steps, experts = load.shape
    ax = new_axes(ax, rows_size(experts))
    block = -(-steps // _MOST_STEPS)
    means = _block_means(load, block)
    image = ax.imshow(
        means.T, vmin=0, vmax=_brightest(means), cmap="viridis", interpolation="nearest",
        aspect="auto", origin="lower", extent=(0.5, len(means) * block + 0.5, -0.5, experts - 0.5),
    )  # fmt: skip
    ax.set_xlim(0.5, steps + 0.5)
    ax.figure.colorbar(image, ax=ax, label="share of choices")
    title = f"Load of {shown(router or 'the router')} (balanced: {1 / experts:.1%})"
    ax.set(xlabel="step", ylabel="expert", title=title)
    count_on(ax.xaxis)
    count_on(ax.yaxis)
    return ax


def _brightest(load: np.ndarray) -> float:
    """Share at the bright end: the largest, but at least twice the balanced one."""
    return max(2 / load.shape[1], float(load.max()))


def _block_means(load: np.ndarray, block: int) -> np.ndarray:
    """Means over blocks of so many steps; the last may be shorter."""
    starts = np.arange(0, len(load), block)
    lengths = np.diff([*starts, len(load)])
    return np.add.reduceat(load, starts) / lengths[:, None]


def _may_have_axes(values: Any, axes: int) -> bool:
    """Whether so many axes are there; rows of different lengths are left to ``numbers``."""
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
    """A statistic of routers over steps, all of them with so many axes."""
    names = list(history) if routers is None else routers
    if not names or any(name not in list(history) for name in names):
        raise InputError(f"routers {names} were not recorded, only {list(history)}")
    series = {name: named(f"history[{name!r}]", history[name]) for name in names}
    for values in series.values():
        known = [key for key, value in values.items() if _may_have_axes(value, axes)]
        one_of("statistic", statistic, known)
    return {
        name: numbers(f"{statistic} of {name!r}", values[statistic], axes, gaps=gaps)
        for name, values in series.items()
    }
