"""Pictures can be read."""

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.pictures import _name

CROWDED = {f"method-{index}": (2e6, 0.5) for index in range(8)}


@pytest.mark.parametrize(
    "places",
    [
        CROWDED,
        {f"method-{index}": (2e6 * 1.01**index, 0.5 + index / 1e3) for index in range(8)},
        CROWDED | {"above": (2e6, 0.53), "beside": (2.1e6, 0.5)},
    ],
)
def test_names_lie_beside_each_other_however_close_their_points(places):
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.set(xscale="log", xlim=(1e6, 4e6), ylim=(0, 1))
    _name(ax, places)
    canvas.draw()
    assert {text.get_text() for text in ax.texts} == set(places)
    # Of the names alone: an annotation's own extent has its line as well.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_names_with_room_stay_at_their_points():
    ax = Figure().subplots()
    ax.set(xscale="log", xlim=(1e6, 4e6), ylim=(0, 1))
    _name(ax, {"low": (2e6, 0.2), "high": (2e6, 0.8), "far": (1.1e6, 0.2)})
    assert {text.get_text(): text.xyann[1] for text in ax.texts} == {
        "low": 0.2, "high": 0.8, "far": 0.2,
    }  # fmt: skip
