"""Pictures of the experiments are readable; the stored ones match the stored results."""

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from experiments import pictures
from experiments.folder import read
from experiments.report import page
from experiments.settings import all_settings
from experiments.texts import default_texts

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
STORED = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}


@pytest.fixture(scope="module")
def settings():
    return all_settings("full", *default_texts())


def test_there_are_stored_results():
    assert len(STORED) == 5


@pytest.mark.parametrize("name", STORED)
def test_stored_pages_and_pictures_are_those_that_the_stored_results_give(name, settings, tmp_path):
    data = read(STORED[name])
    drawn = pictures.draw(settings[name], data, tmp_path)
    stored = STORED[name].with_suffix(".md").read_text(encoding="utf-8")
    assert page(settings[name], data, drawn) == stored
    assert {each.path.name for each in drawn} == {
        path.name for path in RESULTS.glob(f"{name}-*") if path.suffix in (".svg", ".png")
    }
    assert all(each.path.stat().st_size < 300_000 for each in drawn)


def test_a_picture_is_the_same_whenever_it_is_drawn(settings, tmp_path):
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        pictures.draw(settings["smollm2"], read(STORED["smollm2"]), folder)
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0]
    assert all(b"<dc:date>" not in text for text in drawn[0].values())


def visible(figure):
    """Return all texts of a figure with their places, except ticks beyond the axes."""
    FigureCanvasAgg(figure).draw()
    for ax in figure.axes + [child for each in figure.axes for child in each.child_axes]:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
                label.set_visible(min(low, high) <= place <= max(low, high))
    texts = [each for each in figure.findobj(Text) if each.get_text() and each.get_visible()]
    return {(each.get_text(), index): each.get_window_extent() for index, each in enumerate(texts)}


@pytest.mark.parametrize("name", STORED)
def test_no_text_of_a_picture_lies_on_another_or_beyond_the_edge(name, settings):
    data = read(STORED[name])
    drawings = [
        pictures._methods, pictures._mask, pictures._load,
        pictures._against("parameters", "all"), pictures._against("active_parameters", "active"),
    ]  # fmt: skip
    for drawn in (drawing(settings[name], data["results"]) for drawing in drawings):
        if drawn is None:
            continue
        figure, _ = drawn
        boxes = visible(figure)
        on_others = [
            (one, other)
            for (one, box), (other, place) in combinations(boxes.items(), 2)
            if box.overlaps(place)
        ]
        assert on_others == []
        width, height = figure.canvas.get_width_height()
        for box in boxes.values():
            assert box.x0 >= 0
            assert box.x1 <= width
            assert box.y0 >= 0
            assert box.y1 <= height


def test_every_method_is_named_in_its_row(settings):
    data = read(STORED["decoder"])
    figure, alt = pictures._methods(settings["decoder"], data["results"])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(settings["decoder"].methods)
    means = {name: pictures._point(settings["decoder"], data["results"], name, "parameters")[1]
             for name in names}  # fmt: skip
    assert names == sorted(names, key=means.get)
    assert alt.startswith("Held-out loss of 47 methods")
