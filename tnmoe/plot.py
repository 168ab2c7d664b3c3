"""Pictures. Every function draws on ``ax`` (a new figure's by default) and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from tnmoe.errors import InputError, MissingExtraError, one_of

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise MissingExtraError("tnmoe.plot", "matplotlib", "plot") from error

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curves(
    losses: Mapping[str, Sequence[float]], ax: Axes | None = None, window: int = 10
) -> Axes:
    """Training losses against steps, smoothed by a running mean over the raw values.

    Parameters
    ----------
    losses : mapping from str to sequence of float
        Loss at every step, per model.
    ax : Axes, optional
    window : int
        Steps in the running mean.
    """
    ax = _axes(ax)
    for color, (name, values) in zip(COLORS, losses.items(), strict=False):
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        width = max(1, min(window, len(values)))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=color, label=name)
    ax.set(xlabel="step", ylabel="training loss", title=f"Training loss (mean of {window} steps)")
    ax.legend()
    return ax


def expert_load(load: Any, ax: Axes | None = None, brightest: float | None = None) -> Axes:
    """Heat map of the share of tokens per layer and expert.

    Parameters
    ----------
    load : array, shape (layers, E)
        Shares; every row sums to 1.
    ax : Axes, optional
    brightest : float, optional
        Share at the bright end of the colours, for pictures that are to be compared; by default
        the largest, but at least twice the balanced one.
    """
    ax = _axes(ax)
    load = np.asarray(load, dtype=float)
    balanced = 1 / load.shape[1]
    brightest = brightest or max(2 * balanced, float(load.max()))
    ax.imshow(load, vmin=0, vmax=brightest, cmap="viridis", aspect="auto")
    for (layer, expert), share in np.ndenumerate(load):
        dark = share < brightest / 2
        ax.text(
            expert, layer, f"{share:.0%}", ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    ax.set(xlabel="expert", ylabel="layer", title=f"Load per expert (balanced: {balanced:.1%})")
    ax.set_xticks(range(load.shape[1]))
    ax.set_yticks(range(load.shape[0]))
    return ax


def schmidt_spectra(spectra: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Schmidt values, relative to the largest, against their share of the bond.

    Parameters
    ----------
    spectra : mapping from str to array
        Descending Schmidt values, per bond.
    ax : Axes, optional
    """
    ax = _axes(ax)
    for color, (name, values) in zip(COLORS, spectra.items(), strict=False):
        values = np.asarray(values, dtype=float)
        share = (np.arange(len(values)) + 1) / len(values)
        largest = values.max(initial=0.0) or 1.0
        ax.plot(share, values / largest, color=color, label=f"{name} (dimension {len(values)})")
    ax.set(
        xlabel="index / bond dimension",
        ylabel="Schmidt value / largest",
        ylim=(0, 1.05),
        title="Schmidt spectra",
    )
    ax.legend()
    return ax


def routing_statistic(
    history: Mapping[str, Mapping[str, Any]],
    statistic: str = "max_violation",
    ax: Axes | None = None,
) -> Axes:
    """One statistic of every router against steps.

    Parameters
    ----------
    history : RoutingHistory, or mapping from str to mapping from str to array
        Per router, arrays of statistics over steps.
    statistic : {"max_violation", "entropy", "dropped", "untouched"}
        Which one.
    ax : Axes, optional

    Raises
    ------
    InputError
        If nothing was recorded, or the statistic is not one number per step.
    """
    series = _series(history, statistic, axes=1)
    ax = _axes(ax)
    for color, (name, values) in zip(cycle(COLORS), series.items(), strict=False):
        ax.plot(np.arange(1, len(values) + 1), values, color=color, label=name or "router")
    ax.set(xlabel="step", ylabel=statistic.replace("_", " "), title="Routers in training")
    ax.legend()
    return ax


def load_history(
    history: Mapping[str, Mapping[str, Any]], router: str, ax: Axes | None = None
) -> Axes:
    """Heat map of one router's load per expert against steps.

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
    """
    load = _series(history, "load", axes=2, routers=[router])[router]
    ax = _axes(ax)
    balanced = 1 / load.shape[1]
    image = ax.imshow(
        load.T, vmin=0, vmax=max(2 * balanced, float(load.max())), cmap="viridis",
        aspect="auto", origin="lower", extent=(0.5, len(load) + 0.5, -0.5, load.shape[1] - 0.5),
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label=f"share of choices (balanced: {balanced:.1%})")
    ax.set(xlabel="step", ylabel="expert", title=f"Load of {router or 'the router'}")
    return ax


def _series(
    history: Mapping[str, Mapping[str, Any]],
    statistic: str,
    axes: int,
    routers: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """A statistic of routers over steps, all of them with so many axes."""
    names = list(history) if routers is None else routers
    if not names or any(name not in list(history) for name in names):
        raise InputError(f"routers {names} were not recorded, only {list(history)}")
    series = {name: history[name] for name in names}
    known = [key for key, value in series[names[0]].items() if np.ndim(value) == axes]
    one_of("statistic", statistic, known)
    return {name: np.asarray(values[statistic], dtype=float) for name, values in series.items()}


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax
