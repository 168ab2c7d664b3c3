"""Pictures. Every function draws on ``ax`` (a new figure's by default) and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnmoe.errors import MissingExtraError

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


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax
