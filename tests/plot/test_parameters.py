"""Errors and sizes are drawn at their values."""

import pytest

from tests.plot.drawings import axes, legend, texts
from tnmoe import plot


def test_parts_are_told_below_the_name_of_the_axis():
    ax = plot.parameter_bars({"a": {"one": 1, "two": 2}}, axes())
    for height in (2, 4.8, 9):
        ax.figure.set_figheight(height)
        ax.figure.canvas.draw()
        legend_box, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
        assert 0 < legend_box.y1 <= label.y0


def test_errors_are_drawn_in_order_with_their_bounds_and_the_dense_matrix():
    points = [(300, 0.2, 0.25), (100, 0.8, 0.9), (200, 0.5, 0.5)]
    ax = plot.error_against_parameters({"bare": [(50, 0.9)], "a": points}, axes(), dense=400)
    bare, error, bound, dense = ax.lines
    assert list(bare.get_ydata()) == [0.9]
    assert list(error.get_xdata()) == list(bound.get_xdata()) == [100, 200, 300]
    assert list(error.get_ydata()) == [0.8, 0.5, 0.2]
    assert list(bound.get_ydata()) == [0.9, 0.5, 0.25]
    assert bound.get_color() == error.get_color()
    assert bound.get_alpha() < 1
    assert list(dense.get_xdata()) == [400, 400]
    assert legend(ax) == ["bare", "a", "guaranteed bound (lighter)", "dense: 400"]


@pytest.mark.parametrize(
    ("errors", "scale"),
    [([0.9, 0.5], "linear"), ([0.9, 1e-6], "log"), ([0.9, 1e-6, 0], "symlog"), ([0, 0], "linear")],
)
def test_errors_far_apart_are_drawn_by_their_logarithm_and_zero_has_its_place(errors, scale):
    points = [(10 * (index + 1), error) for index, error in enumerate(errors)]
    ax = plot.error_against_parameters({"a": points}, axes())
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert all(low < error < high for error in errors)
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("sizes", "scale"), [((100, 200), "linear"), ((100, 10**9), "log")])
def test_sizes_far_apart_are_drawn_by_their_logarithm(sizes, scale):
    ax = plot.error_against_parameters({"a": [(size, 0.5) for size in sizes]}, axes())
    assert ax.get_xscale() == scale
    ax.figure.canvas.draw()
    if scale == "log":
        assert "1 M" in [tick.get_text() for tick in ax.get_xticklabels()]


def test_bars_are_as_long_as_the_numbers():
    ax = plot.parameter_bars({"dense": 1000, "MoE": 8000, "MPOE": 1624}, axes())
    assert [bar.get_width() for bar in ax.patches] == [1000, 8000, 1624]
    assert texts(ax) == ["1 k", "8 k (8×)", "1.62 k (1.62×)"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["dense", "MoE", "MPOE"]
    assert ax.get_legend() is None
    assert texts(plot.parameter_bars({"none": 0, "one": 1}, axes())) == ["0", "1"]


def test_bars_in_parts_begin_where_the_part_before_ends():
    sizes = {"one": {"shared": 10, "owned": 30}, "other": {"owned": 5}}
    ax = plot.parameter_bars(sizes, axes())
    shared, owned = ax.containers
    assert [bar.get_width() for bar in shared] == [10, 0]
    assert [(bar.get_x(), bar.get_width()) for bar in owned] == [(10, 30), (0, 5)]
    assert owned[0].get_hatch() != shared[0].get_hatch()
    assert legend(ax) == ["shared", "owned"]
    assert texts(ax) == ["40", "5 (0.125×)"]


def test_a_parameter_report_is_drawn():
    from transformers import BertConfig

    from tnmoe import hf

    config = BertConfig(num_hidden_layers=2, vocab_size=100)
    report = hf.parameter_report(config, hf.MPOEConfig(num_experts=4))
    ax = plot.parameter_bars(report, axes())
    networks, rest = ax.containers
    forms = ("dense", "moe", "mpoe")
    for bar, other, form in zip(networks, rest, forms, strict=True):
        assert bar.get_width() == sum(getattr(count, form) for count in report.ffns)
        assert other.get_x() + other.get_width() == getattr(report.total, form)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["dense", "MoE of 4", "MPOE"]
