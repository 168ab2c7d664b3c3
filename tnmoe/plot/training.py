"""What changes while a model is trained: losses, and how far cores moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, positive_int
from tnmoe.plot.data import named, numbers
from tnmoe.plot.style import add_legend, count_on, from_zero, line_style, new_axes, shown_apart


def loss_curves(
    losses: Mapping[str, Sequence[float]], ax: Axes | None = None, window: int = 10
) -> Axes:
    """Training losses against steps, smoothed by a running mean over the raw values.

    Parameters
    ----------
    losses : mapping from str to sequence of float
        Loss at every step, per model. NaN and infinity leave gaps.
    ax : Axes, optional
    window : int
        Steps in the running mean.

    Raises
    ------
    InputError
        If there is no model or one without a loss, or ``window`` is not a positive integer.

    Examples
    --------
    >>> ax = loss_curves({"dense": [2.0, 1.5, 1.2], "MPOE": [2.0, 1.4, 1.1]}, window=2)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('step', 'training loss')
    """
    window = positive_int("window", window)
    curves = {
        name: numbers(f"losses[{name!r}]", values, gaps=True)
        for name, values in named("losses", losses).items()
    }
    ax = new_axes(ax)
    labels, common = shown_apart(curves)
    for index, (label, values) in enumerate(zip(labels, curves.values(), strict=True)):
        steps = np.arange(1, len(values) + 1)
        width = min(window, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        style = line_style(index, len(smooth))
        ax.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
        ax.plot(steps[width - 1 :], smooth, label=label, **style)
    ax.set(xlabel="step", ylabel="training loss", title=f"Training loss (mean of {window} steps)")
    count_on(ax.xaxis)
    add_legend(ax, common)
    return ax


def core_drift(
    drift: Mapping[str, Sequence[float]], ax: Axes | None = None, steps: Sequence[int] | None = None
) -> Axes:
    """How far cores moved from where they started, relative to their norm there.

    Shared cores meet the gradient of every token, owned ones only that of their expert's, so the
    shared line usually runs above. In our experiments that did no harm, and slowing it did.

    Parameters
    ----------
    drift : mapping from str to sequence of float
        Per kind of core ("shared", "owned") or per core, ‖core − core at the start‖ / ‖core at
        the start‖ over time. NaN and infinity leave gaps.
    ax : Axes, optional
    steps : sequence of int, optional
        When it was measured; by default at steps 1, 2, 3 and so on.

    Raises
    ------
    InputError
        If nothing was measured, a change is negative, or ``steps`` has another length.

    Examples
    --------
    >>> ax = core_drift({"shared": [0, 0.2, 0.3], "owned": [0, 0.05, 0.06]}, steps=[0, 50, 100])
    >>> [line.get_label() for line in ax.lines]
    ['shared', 'owned']
    """
    curves = {
        name: numbers(f"drift[{name!r}]", values, lowest=0, gaps=True)
        for name, values in named("drift", drift).items()
    }
    given = None if steps is None else numbers("steps", steps)
    for name, values in curves.items():
        if given is not None and len(given) != len(values):
            raise InputError(
                f"steps needs one entry per value: got {len(given)} steps and {len(values)} values "
                f"of {name!r}"
            )
    ax = new_axes(ax)
    labels, common = shown_apart(curves)
    for index, (label, values) in enumerate(zip(labels, curves.values(), strict=True)):
        x: Any = np.arange(1, len(values) + 1) if given is None else given
        ax.plot(x, values, label=label, **line_style(index, len(values)))
    ax.set(
        xlabel="step", ylabel="relative change ‖Δ core‖ / ‖core at the start‖", title="Core drift"
    )
    from_zero(ax)
    count_on(ax.xaxis)
    add_legend(ax, common)
    return ax
