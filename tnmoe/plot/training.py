"""Pictures of training: losses, and the drift of cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, check_positive_int
from tnmoe.plot.data import check_mapping, check_numbers
from tnmoe.plot.style import (
    add_legend,
    distinct_labels,
    integer_ticks,
    line_style,
    new_axes,
    start_at_zero,
)


def loss_curves(
    losses: Mapping[str, Sequence[float]], ax: Axes | None = None, window: int = 10
) -> Axes:
    """Plot training losses against steps, raw and smoothed by a running mean.

    Parameters
    ----------
    losses : mapping from str to sequence of float
        Per model, the loss at every step. NaN and infinity leave gaps.
    ax : Axes, optional
    window : int
        Steps in the running mean.

    Raises
    ------
    InputError
        If there is no model, a model has no loss, or ``window`` is not a positive integer.

    Examples
    --------
    >>> ax = loss_curves({"dense": [2.0, 1.5, 1.2], "MPOE": [2.0, 1.4, 1.1]}, window=2)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('step', 'training loss')
    """
    window = check_positive_int("window", window)
    curves = {
        name: check_numbers(f"losses[{name!r}]", values, gaps=True)
        for name, values in check_mapping("losses", losses).items()
    }
    ax = new_axes(ax)
    labels, common = distinct_labels(curves)
    for index, (label, values) in enumerate(zip(labels, curves.values(), strict=True)):
        steps = np.arange(1, len(values) + 1)
        width = min(window, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        style = line_style(index, len(smooth))
        ax.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
        ax.plot(steps[width - 1 :], smooth, label=label, **style)
    ax.set(xlabel="step", ylabel="training loss", title=f"Training loss (mean of {window} steps)")
    integer_ticks(ax.xaxis)
    add_legend(ax, common)
    return ax


def core_drift(
    drift: Mapping[str, Sequence[float]], ax: Axes | None = None, steps: Sequence[int] | None = None
) -> Axes:
    """Plot how far cores moved from their start, relative to their norm at the start.

    A shared core gets the gradient of every token, an expert's own core only that of the expert's
    tokens, so the line of the shared cores usually lies above. In our experiments this did no harm,
    and slowing the shared cores down did.

    Parameters
    ----------
    drift : mapping from str to sequence of float
        Per kind of core ("shared", "owned") or per core, ‖core − core at the start‖ / ‖core at
        the start‖ over time. NaN and infinity leave gaps.
    ax : Axes, optional
    steps : sequence of int, optional
        Steps at which the drift was measured; by default 1, 2, 3 and so on.

    Raises
    ------
    InputError
        If ``drift`` is empty, a value is negative, or ``steps`` has another length.

    Examples
    --------
    >>> ax = core_drift({"shared": [0, 0.2, 0.3], "owned": [0, 0.05, 0.06]}, steps=[0, 50, 100])
    >>> [line.get_label() for line in ax.lines]
    ['shared', 'owned']
    """
    curves = {
        name: check_numbers(f"drift[{name!r}]", values, lowest=0, gaps=True)
        for name, values in check_mapping("drift", drift).items()
    }
    measured_at = None if steps is None else check_numbers("steps", steps)
    for name, values in curves.items():
        if measured_at is not None and len(measured_at) != len(values):
            raise InputError(
                f"steps needs one entry per value: got {len(measured_at)} steps and "
                f"{len(values)} values of {name!r}"
            )
    ax = new_axes(ax)
    labels, common = distinct_labels(curves)
    for index, (label, values) in enumerate(zip(labels, curves.values(), strict=True)):
        x: Any = np.arange(1, len(values) + 1) if measured_at is None else measured_at
        ax.plot(x, values, label=label, **line_style(index, len(values)))
    ax.set(
        xlabel="step", ylabel="relative change ‖Δ core‖ / ‖core at the start‖", title="Core drift"
    )
    start_at_zero(ax)
    integer_ticks(ax.xaxis)
    add_legend(ax, common)
    return ax
