"""Series can be told apart, names are drawn literally, and figures have sensible sizes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from tests.plot.drawings import axes, legend
from tnmoe import plot
from tnmoe.plot.style import COLORS, distinct_labels, label_text


def many_series(count):
    return {f"{index}": np.full(3, float(index)) for index in range(count)}


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_every_series_is_drawn_and_named_however_many_there_are(count):
    for ax in (
        plot.core_drift(many_series(count), axes()),
        plot.schmidt_spectra(many_series(count), axes()),
        plot.routing_statistic(
            {name: {"entropy": values} for name, values in many_series(count).items()},
            "entropy",
            axes(),
        ),
    ):
        assert len(ax.lines) == len(legend(ax)) == count
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}
        assert len(looks) == count
    assert len(plot.loss_curves(many_series(count), axes()).lines) == 2 * count


def test_neighbouring_series_differ_without_colour():
    lines = plot.core_drift(many_series(7), axes()).lines
    assert len({line.get_marker() for line in lines}) == 7
    styles = [line.get_linestyle() for line in lines]
    assert all(one != other for one, other in pairwise(styles))


def test_the_palette_is_okabe_and_itos():
    # Okabe and Ito, Color Universal Design (2008), without the yellow, which is pale on white.
    published = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
                 (86, 180, 233), (0, 0, 0)]  # fmt: skip
    np.testing.assert_allclose([to_rgb(color) for color in COLORS], np.array(published) / 255)


def test_names_are_drawn_as_they_are():
    ax = plot.core_drift({"_orig_mod.router": [1, 2], "$5 and $6": [1, 2]}, axes())
    ax.figure.canvas.draw()  # what lies between dollars is not a formula
    assert [text.strip() for text in legend(ax)] == ["_orig_mod.router", r"\$5 and \$6"]


def test_long_names_keep_what_tells_them_apart():
    names = [f"model.layers.{index}.moe.gate.router" for index in (0, 1, 11)]
    assert distinct_labels(names) == (["0", "1", "11"], "model.layers.*.moe.gate.router")
    assert distinct_labels(names[:1]) == (names[:1], None)
    assert distinct_labels(["layer.0", "layer.1"]) == (["layer.0", "layer.1"], None)
    assert distinct_labels(["one that is rather long", "other"])[1] is None
    assert len(label_text("long" * 100)) == 40
    ax = plot.core_drift({name: [1, 2] for name in names}, axes())
    assert legend(ax) == ["0", "1", "11"]
    assert ax.get_legend().get_title().get_text() == "model.layers.*.moe.gate.router"


@given(st.lists(st.text("ab. ,/", max_size=30), min_size=1, max_size=5, unique=True))
def test_what_names_have_in_common_and_of_their_own_make_up_the_names(names):
    own, common = distinct_labels(names)
    if common is None:
        assert own == names
    else:
        # What was cut is put back in the place of the star.
        assert [common.replace("*", each) for each in own] == names


@pytest.mark.parametrize(
    "drawing",
    [
        lambda rows: plot.expert_load(np.full((rows, 8), 1 / 8)),
        lambda rows: plot.expert_load(np.full((rows, 64), 1 / 64)),
        lambda rows: plot.load_history({"a": {"load": np.full((9, rows), 1 / rows)}}, "a"),
        lambda rows: plot.parameter_bars({f"{row}": row + 1 for row in range(rows)}),
    ],
)
def test_few_rows_make_a_low_figure_and_not_high_rows(drawing):
    import matplotlib.pyplot as plt

    heights = []
    for rows in (1, 2, 3, 12):
        ax = drawing(rows)
        ax.figure.canvas.draw()
        assert 0.2 < ax.bbox.height / ax.figure.dpi / rows < 0.75  # inches
        heights.append(ax.figure.get_figheight())
        plt.close(ax.figure)
    assert heights == sorted(heights)
