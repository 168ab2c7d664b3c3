"""Pictures show the data that they were given, on the axes that they were given, without a display.

How they look was judged by eye; here is what can be counted.
"""

import os
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

import tnmoe as tn
from tests.plot.drawings import SHAPE
from tnmoe import plot

HISTORY = {"a": {"load": [[0.2, 0.8], [0.5, 0.5]], "entropy": [0.1, 0.6]}}
DRAWINGS = {
    "core_drift": lambda ax: plot.core_drift({"shared": [0.0, 0.1], "owned": [0.0, 0.2]}, ax),
    "entropy": lambda ax: plot.entropy({"a": [0.1, 0.2]}, ax, bond_dims=(4, 2)),
    "error_against_parameters": lambda ax: plot.error_against_parameters({"a": [(10, 0.5)]}, ax),
    "expert_load": lambda ax: plot.expert_load([[0.5, 0.5]], ax),
    "load_history": lambda ax: plot.load_history(HISTORY, "a", ax),
    "loss_curves": lambda ax: plot.loss_curves({"a": [2.0, 1.0]}, ax),
    "network": lambda ax: plot.network(SHAPE, ax),
    "parameter_bars": lambda ax: plot.parameter_bars({"a": 10}, ax),
    "routing_statistic": lambda ax: plot.routing_statistic(HISTORY, "entropy", ax),
    "schmidt_spectra": lambda ax: plot.schmidt_spectra({"a": [1.0, 0.5]}, ax),
}


def test_every_public_function_is_drawn_here():
    assert sorted(DRAWINGS) == plot.__all__


@pytest.mark.parametrize("name", DRAWINGS)
def test_axes_that_are_given_are_drawn_on_and_returned(name):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert DRAWINGS[name](right) is right
    assert right.has_data()
    assert not left.has_data()
    # Part of a figure is as good as a whole one.
    part = Figure(layout="constrained").subfigures(1, 2)[0].subplots()
    DRAWINGS[name](part).figure.figure.canvas.draw()


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_axes_a_new_figure_is_made_and_drawn(name):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    ax = DRAWINGS[name](None)
    assert len(plt.get_fignums()) == len(before) + 1
    ax.figure.canvas.draw()
    plt.close(ax.figure)


@pytest.mark.parametrize("name", DRAWINGS)
def test_what_is_no_axes_is_refused(name):
    pair = Figure().subplots(1, 2)
    with pytest.raises(tn.InputError, match="ax must be one matplotlib Axes, got ndarray"):
        DRAWINGS[name](pair)


def test_no_display_is_needed_and_pyplot_only_for_new_figures(tmp_path):
    code = f"""
import sys
from itertools import pairwise
from matplotlib.figure import Figure
import tnmoe as tn
from tnmoe import plot
ax = plot.network(tn.MPOShape((2, 2), (2, 2)), ax=Figure().subplots())
ax.figure.savefig({str(tmp_path / "given.png")!r})
print("matplotlib.pyplot" in sys.modules, "torch" in sys.modules)
plot.parameter_bars({{"dense": 1}}).figure.savefig({str(tmp_path / "new.png")!r})
"""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert process.stdout.split() == ["False", "False"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.png", "new.png"]
