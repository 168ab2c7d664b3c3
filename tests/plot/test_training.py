"""Losses and drift are drawn at the steps where they were measured."""

import numpy as np
import torch

from tests.plot.drawings import axes, legend
from tnmoe import plot


def test_losses_are_drawn_raw_and_smoothed():
    raw, smooth = plot.loss_curves({"a": [4.0, 2.0, 0.0, 2.0]}, axes(), window=2).lines
    assert list(raw.get_ydata()) == [4, 2, 0, 2]
    assert list(smooth.get_xdata()) == [2, 3, 4]
    assert list(smooth.get_ydata()) == [3, 1, 1]


def test_a_diverged_loss_leaves_a_gap():
    losses = [3.0, 2.0, np.nan, np.inf, 2.0, 1.0]
    ax = plot.loss_curves({"a": losses, "lost": [np.nan]}, axes(), window=2)
    np.testing.assert_array_equal(
        np.isfinite(ax.lines[1].get_ydata()), [True, False, False, False, True]
    )
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    assert np.isfinite([low, high]).all()
    plot.core_drift({"a": losses, "lost": [np.nan]}, axes()).figure.canvas.draw()


def test_drift_is_drawn_against_the_steps_given():
    drift = {"shared": [0.0, 0.2, 0.4], "owned": torch.tensor([0.0, 0.1, 0.2])}
    ax = plot.core_drift(drift, axes(), steps=[0, 50, 100])
    for line, values in zip(ax.lines, drift.values(), strict=True):
        assert list(line.get_xdata()) == [0, 50, 100]
        np.testing.assert_allclose(line.get_ydata(), values)
    assert legend(ax) == ["shared", "owned"]
    assert list(plot.core_drift({"a": [0.5]}, axes()).lines[0].get_xdata()) == [1]
