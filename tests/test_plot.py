"""Pictures show the data that they were given, on the axes that they were given, without a display.

How they look was judged by eye; here is what can be counted.
"""

import os
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

import tnmoe as tn
from tnmoe import plot
from tnmoe.plot.style import COLORS, shown, shown_apart

matplotlib.use("Agg")

SHAPE = tn.MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
SPLIT = tn.MPOShape.split(48, 36, left=8, right=6)
HISTORY = {"a": {"load": [[0.2, 0.8], [0.5, 0.5]], "entropy": [0.1, 0.6]}}
LONG = "a.rather.long.name.of.a.layer.in.a.deep.model"
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


def axes():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)  # the canvas that a figure has by itself draws nothing
    return figure.subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


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


# Style


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
    ax.figure.canvas.draw()  # what lies between dollars is no formula
    assert [text.strip() for text in legend(ax)] == ["_orig_mod.router", r"\$5 and \$6"]


def test_long_names_keep_what_tells_them_apart():
    names = [f"model.layers.{index}.moe.gate.router" for index in (0, 1, 11)]
    assert shown_apart(names) == (["0", "1", "11"], "model.layers.*.moe.gate.router")
    assert shown_apart(names[:1]) == (names[:1], None)
    assert shown_apart(["layer.0", "layer.1"]) == (["layer.0", "layer.1"], None)
    assert shown_apart(["one that is rather long", "other"])[1] is None
    assert len(shown("long" * 100)) == 40
    ax = plot.core_drift({name: [1, 2] for name in names}, axes())
    assert legend(ax) == ["0", "1", "11"]
    assert ax.get_legend().get_title().get_text() == "model.layers.*.moe.gate.router"


@given(st.lists(st.text("ab. ,/", max_size=30), min_size=1, max_size=5, unique=True))
def test_what_names_have_in_common_and_of_their_own_make_up_the_names(names):
    own, common = shown_apart(names)
    if common is None:
        assert own == names
    else:
        # What was cut is put back in the place of the star.
        assert [common.replace("*", each) for each in own] == names


# Networks


def nodes(ax):
    squares = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return squares, [patch for patch in ax.patches if isinstance(patch, Circle)]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.sampled_from(["shape", "mpo", "shared"]),
    st.integers(1, 32),
)
def test_a_network_has_its_cores_bonds_and_legs(legs, kind, experts):
    shape = tn.MPOShape(*zip(*legs, strict=True))
    operator = shape if kind == "shape" else tn.MPO.random(shape, max_bond=3, rng=0)
    if kind == "shared" and shape.sites > 1:
        operator = tn.SharedMPO.replicate(operator, experts)
    bonds = shape.bond_dims(None if kind == "shape" else 3)
    ax = plot.network(operator, axes())
    shared = isinstance(operator, tn.SharedMPO)

    squares, circles = nodes(ax)
    assert len(squares) == 1
    assert len(circles) == (shape.sites - 1) * (min(experts, 3) if shared else 1)
    assert len(ax.lines) == 3 * shape.sites - 1
    expected = [
        *(str(dim) for dim in (*bonds, *range(shape.sites))),
        *(str(dim) for leg in legs for dim in leg if dim > 1),
        *[f"×{experts}"] * (shape.sites - 1 if shared else 0),
        "input legs",
        "output legs",
    ]
    assert sorted(texts(ax)) == sorted(expected)
    assert f"{shape.out_features} × {shape.in_features}" in ax.get_title()
    params = operator.num_params() if kind == "shape" else operator.num_params
    assert f"\n{params:,} parameters" in ax.get_title()


def test_dimensions_stand_where_they_belong():
    ax = plot.network(SHAPE, axes())
    up = {round(text.get_position()[0]): text.get_text() for text in ax.texts
          if text.get_position()[1] > 0.3 and text.get_position()[0] >= 0}  # fmt: skip
    down = {round(text.get_position()[0]): text.get_text() for text in ax.texts
            if text.get_position()[1] < -0.3 and text.get_position()[0] >= 0}  # fmt: skip
    between = {text.get_position()[0]: text.get_text() for text in ax.texts
               if text.get_position()[0] % 1 == 0.5}  # fmt: skip
    assert list(up.values()) == [str(dim) for dim in SHAPE.out_dims]
    assert list(down.values()) == [str(dim) for dim in SHAPE.in_dims]
    assert between == {bond + 0.5: str(dim) for bond, dim in enumerate(SHAPE.bond_dims())}


def test_the_central_core_is_the_operators_own():
    def center_of(operator):
        square = nodes(plot.network(operator, axes()))[0][0]
        return round(square.get_x() + square.get_width() / 2)

    mpo = tn.MPO.random(SHAPE, max_bond=4, rng=0)
    assert center_of(SHAPE) == center_of(mpo) == SHAPE.center_site == 2
    assert center_of(mpo.canonicalize(4)) == 4
    assert center_of(tn.SharedMPO.replicate(mpo.canonicalize(1), 3)) == 1


def test_lines_widen_with_the_logarithm_of_their_dimension():
    dims = (1, 4, 16, 256)
    pairs = zip((1, *dims), (*dims, 1), strict=True)
    ax = plot.network(tn.MPO([np.zeros((left, 4, 4, right)) for left, right in pairs]), axes())
    widths = [line.get_linewidth() for line in ax.lines[: len(dims)]]
    np.testing.assert_allclose(
        np.diff(widths), np.diff(np.log2(dims)) * (widths[1] - widths[0]) / 2
    )
    assert ax.lines[0].get_linestyle() == ":"


def test_legs_of_size_1_are_dotted_and_not_labelled():
    ax = plot.network(SPLIT, axes())
    assert sum(line.get_linestyle() == ":" for line in ax.lines) == 2
    assert texts(ax).count("1") == 1  # the number of the middle site


def test_a_mixture_of_torch_tensors_is_drawn():
    mpo = tn.decompose(torch.randn(48, 36), SPLIT)
    ax = plot.network(tn.SharedMPO.replicate(mpo, 32), axes())
    assert ax.get_title().startswith("32 experts of 48 × 36, 3 sites")
    assert legend(ax) == ["central core, shared", "auxiliary cores, one per expert"]


def test_a_new_figure_grows_with_the_sites():
    import matplotlib.pyplot as plt

    widths = []
    for sites in (1, 5, 20):
        ax = plot.network(tn.MPOShape((2,) * sites, (2,) * sites))
        widths.append(ax.figure.get_figwidth())
        plt.close(ax.figure)
    assert widths[0] < widths[1] < widths[2]


# Size


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


def test_parts_are_told_below_the_name_of_the_axis():
    ax = plot.parameter_bars({"a": {"one": 1, "two": 2}}, axes())
    for height in (2, 4.8, 9):
        ax.figure.set_figheight(height)
        ax.figure.canvas.draw()
        legend_box, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
        assert 0 < legend_box.y1 <= label.y0


# Spectra and entropy


def test_spectra_are_relative_to_the_largest_value():
    ax = plot.schmidt_spectra({"b": [4.0, 2.0, 1.0, 0.0], "zero": torch.zeros(2)}, axes())
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1, 0.5, 0.25, 0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0, 0])
    assert legend(ax) == ["b (dimension 4)", "zero (dimension 2)"]


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 1e-3, 1e-6, 1e-9],
        [1.0, 0.9, 0.8],
        [2.0, 2.0, 2.0],
        [3e30, 3e20],
        [1e-30, 1e-33],
        [5.0],
        np.geomspace(1, 1e-7, 64, dtype=np.float32),
    ],
)
def test_spectra_are_drawn_by_their_logarithm_and_whole(values):
    ax = plot.schmidt_spectra({"a": values}, axes())
    ax.figure.canvas.draw()
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert all(low < value < high for value in ax.lines[0].get_ydata())
    assert high > 10 * low


@pytest.mark.parametrize("values", [[1.0, 0.5, 0.0], [0.0, 0.0], [1.0, 1e-3, 1e-18, 1e-300]])
def test_schmidt_values_of_zero_have_their_place_below_all_others(values):
    ax = plot.schmidt_spectra({"a": values}, axes())
    ax.figure.canvas.draw()
    assert ax.get_yscale() == "symlog"
    assert "$\\mathdefault{0}$" in [tick.get_text() for tick in ax.get_yticklabels()]
    places = ax.transData.transform([(1, value) for value in ax.lines[0].get_ydata()])[:, 1]
    zero = ax.transData.transform((1, 0))[1]
    bottom, top = ax.bbox.y0, ax.bbox.y1
    assert all(bottom < place < top for place in [*places, zero])
    for value, place in zip(values, places, strict=True):
        # What is rounding lies on zero, what is more a tenth of the axis above it.
        assert (place - zero > 0.1 * (top - bottom)) == (value >= 1e-15)


def test_spectra_of_an_operator_and_of_a_truncation_are_those_of_all_bonds():
    matrix = np.random.default_rng(0).normal(size=(48, 36))
    shape = tn.MPOShape((4, 4, 3), (3, 4, 3))
    mpo, info = tn.decompose(matrix, shape, max_bond=5, return_info=True)
    ax = plot.schmidt_spectra(mpo, axes())
    assert legend(ax) == ["bond 0 (dimension 5)", "bond 1 (dimension 5)"]
    for bond, line in enumerate(ax.lines):
        # Independent of tnmoe's gauges: singular values of the matrix between the legs.
        tensor = mpo.to_matrix().reshape(4, 4, 3, 3, 4, 3).transpose(0, 3, 1, 4, 2, 5)
        values = np.linalg.svd(tensor.reshape(12 * 16**bond, -1), compute_uv=False)[:5]
        np.testing.assert_allclose(line.get_ydata(), values / values[0])
    ax = plot.schmidt_spectra(info, axes())
    assert legend(ax) == ["bond 0 (dimension 12)", "bond 1 (dimension 9)"]
    for line, values in zip(ax.lines, info.spectra, strict=True):
        np.testing.assert_allclose(line.get_ydata(), values / values[0])


def test_spectra_of_several_operators_are_named_by_operator_and_bond():
    mpo = tn.decompose(torch.eye(36).bfloat16(), tn.MPOShape((6, 6), (6, 6)))
    info = tn.TruncationInfo((0.0,), ([1.0, 0.5],), ("svd",))
    ax = plot.schmidt_spectra({"one": mpo, "seen": info, "values": [1, 0.1]}, axes())
    assert legend(ax) == [
        "one, bond 0 (dimension 36)", "seen, bond 0 (dimension 2)", "values (dimension 2)",
    ]  # fmt: skip


def test_entropies_of_what_a_truncation_saw_are_those_before_it():
    matrix = np.random.default_rng(0).normal(size=(48, 36))
    shape = tn.MPOShape((8, 6), (6, 6))
    info = tn.decompose(matrix, shape, max_bond=3, return_info=True)[1]
    line, most = plot.entropy(info, axes()).lines
    before = tn.decompose(matrix, shape)
    np.testing.assert_allclose(line.get_ydata(), [before.entropy(0)])
    np.testing.assert_allclose(most.get_ydata(), np.log(before.bond_dims))


def test_entropies_are_those_of_the_operator_below_the_logarithm_of_its_bonds():
    mpo = tn.MPO.random(SHAPE, max_bond=6, rng=0)
    ax = plot.entropy(mpo, axes())
    line, most = ax.lines
    np.testing.assert_allclose(line.get_ydata(), [mpo.entropy(bond) for bond in range(4)])
    np.testing.assert_allclose(most.get_ydata(), np.log(mpo.bond_dims))
    assert (line.get_ydata() <= most.get_ydata()).all()
    assert most.get_label() == "most possible: log(bond dimension)"


def test_entropies_run_along_bonds_or_along_layers():
    layers = {f"layer {index}": [0.1 * index, 1.0, 0.5] for index in range(5)}
    values = np.array(list(layers.values()))
    bonds = plot.entropy(layers, axes())
    assert [list(line.get_ydata()) for line in bonds.lines] == values.tolist()
    assert legend(bonds) == list(layers)
    along = plot.entropy(layers, axes(), against="layer", bond_dims=(2, 4, 2))
    *lines, most = along.lines
    assert [list(line.get_ydata()) for line in lines] == values.T.tolist()
    assert [tick.get_text() for tick in along.get_xticklabels()] == list(layers)
    np.testing.assert_allclose(most.get_ydata(), np.repeat(np.log([2, 4, 2]), 5))
    np.testing.assert_allclose(most.get_xdata(), np.tile(np.arange(5), 3))
    assert legend(along)[:3] == ["bond 0", "bond 1", "bond 2"]


def test_operators_with_other_bonds_each_have_their_own_most():
    mpo = tn.MPO.random(SHAPE, max_bond=6, rng=0)
    ax = plot.entropy({"long": mpo, "short": [0.1]}, axes())
    assert [len(line.get_ydata()) for line in ax.lines[:2]] == [4, 1]
    assert np.isfinite(ax.lines[2].get_ydata()).sum() == 4


def test_entropies_of_zero_are_visible():
    ax = plot.entropy(tn.MPO.zeros(tn.MPOShape((2, 2), (2, 2))), axes())
    assert ax.get_ylim()[0] < 0 < ax.get_ylim()[1]


def test_many_long_names_along_an_axis_do_not_overlap():
    names = [f"layer {index} {'abcdefgh'[index % 8] * 20}" for index in range(24)]
    ax = plot.entropy({name: [0.5] for name in names}, axes(), against="layer")
    ax.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert all(one.x1 <= other.x0 for one, other in pairwise(boxes))
    ax = plot.entropy({f"{index}": [0.5] for index in range(200)}, axes(), against="layer")
    assert len(ax.get_xticklabels()) <= 40


# Parameters


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


# Training and routing


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


def test_loads_are_written_where_they_have_room():
    few = np.full((2, 4), 0.25)
    assert texts(plot.expert_load(few, axes())) == ["25%"] * 8
    many = plot.expert_load(np.full((24, 32), 1 / 32), axes())
    assert texts(many) == []
    assert len(many.figure.axes) == 2  # a scale instead


@pytest.mark.parametrize("steps", [1, 250, 251, 1000, 1001])
def test_load_over_time_is_every_steps_or_means_over_as_many(steps):
    load = np.random.default_rng(0).dirichlet(np.ones(5), steps)
    ax = plot.load_history({"a": {"load": load}}, "a", axes())
    drawn = ax.images[0].get_array().T
    block = -(-steps // 250)
    for index, mean in enumerate(drawn):
        np.testing.assert_allclose(mean, load[index * block : (index + 1) * block].mean(0))
    assert len(drawn) * block >= steps > (len(drawn) - 1) * block
    left, right, bottom, top = ax.images[0].get_extent()
    assert (left, right, bottom, top) == (0.5, len(drawn) * block + 0.5, -0.5, 4.5)
    assert ax.get_xlim() == (0.5, steps + 0.5)


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.network("W"), "network draws an MPOShape, an MPO or a SharedMPO, got str"),
        (lambda: plot.loss_curves({}), r"losses must have at least one entry, got \{\}"),
        (lambda: plot.loss_curves([1.0]), "losses must be a mapping from names, got list"),
        (lambda: plot.loss_curves({"a": []}), r"losses\['a'\] must be a sequence of real numbers"),
        (lambda: plot.loss_curves({"a": ["x"]}), r"losses\['a'\] must be a sequence of numbers"),
        (lambda: plot.loss_curves({"a": [1.0]}, window=0), "window must be a positive integer"),
        (lambda: plot.core_drift({"a": [-0.1]}), "must be finite and at least 0, got -0.1"),
        (lambda: plot.core_drift({"a": [1]}, steps=[1, 2]), "got 2 steps and 1 values of 'a'"),
        (lambda: plot.schmidt_spectra({"a": [1, np.nan]}), "finite and at least 0, got nan"),
        (lambda: plot.schmidt_spectra({"a": [1j]}), "real numbers, at least one, got complex128"),
        (lambda: plot.schmidt_spectra([1.0]), "operators must be a mapping from names, got list"),
        (
            lambda: plot.schmidt_spectra(tn.MPO.zeros(tn.MPOShape((2,), (2,)))),
            r"operators must have a bond, got MPO\(2×2, sites=1",
        ),
        (
            lambda: plot.schmidt_spectra({"a": tn.TruncationInfo((), (), ())}),
            r"operators\['a'\] must have a bond, got TruncationInfo",
        ),
        (lambda: plot.entropy({}), "operators must have at least one entry"),
        (lambda: plot.entropy(np.ones(3)), "operators must be a mapping from names, got ndarray"),
        (lambda: plot.entropy({"a": []}), r"operators\['a'\] must be a sequence of real numbers"),
        (lambda: plot.entropy({"a": [1]}, against="site"), "against must be one of bond, layer"),
        (lambda: plot.entropy({"a": [1]}, bond_dims=(2, 2)), "each of 2 bonds, got 1"),
        (
            lambda: plot.entropy({"a": [1], "b": [1, 2]}, against="layer"),
            r"operators of as many bonds each, got \{'a': 1, 'b': 2\}",
        ),
        (
            lambda: plot.entropy(tn.MPO.zeros(tn.MPOShape((2,), (2,)))),
            r"operators\['operator'\] must have a bond, got MPO\(2×2, sites=1",
        ),
        (lambda: plot.error_against_parameters({}), "truncations must have at least one entry"),
        (
            lambda: plot.error_against_parameters({"a": [(1, 2, 3, 4)]}),
            r"\(parameters, error, bound\) each, got a table of shape \(1, 4\)",
        ),
        (
            lambda: plot.error_against_parameters({"a": [(1, 0.5), (2,)]}),
            r"truncations\['a'\] must be a table of numbers",
        ),
        (lambda: plot.error_against_parameters({"a": [(1, np.inf)]}), "must be finite"),
        (lambda: plot.error_against_parameters({"a": [(1, 1)]}, dense=0), "dense must be a pos"),
        (lambda: plot.parameter_bars({}), "report must have at least one entry"),
        (lambda: plot.parameter_bars(3), "report must be a mapping from names, got int"),
        (lambda: plot.parameter_bars({"a": {}}), r"report\['a'\] must be a sequence of real num"),
        (lambda: plot.parameter_bars({"a": -1}), "finite and at least 0, got -1"),
        (lambda: plot.expert_load([]), "load must be a table of real numbers"),
        (lambda: plot.expert_load([[np.nan]]), "load must be finite and at least 0, got nan"),
        (lambda: plot.load_history({"a": {}}, "a"), r"history\['a'\] must have at least one entry"),
        (lambda: plot.load_history({"a": {"load": [1.0]}}, "a"), "statistic must be one of"),
        (
            lambda: plot.expert_load([[0.5, 0.5], [3, 5]]),
            r"divide counts by their sums, got \[3. 5.\]",
        ),
        (
            lambda: plot.load_history({"a": {"load": [[0.5, 0.5], [1.0]]}}, "a"),
            "load of 'a' must be a table of numbers",
        ),
        (
            lambda: plot.routing_statistic({"a": {"entropy": [[1.0], [1.0, 2.0]]}}, "entropy"),
            "entropy of 'a' must be a sequence of numbers",
        ),
        (
            lambda: plot.routing_statistic(
                {"a": {"entropy": [1]}, "b": {"load": [[1]]}}, "entropy"
            ),
            "statistic must be one of",
        ),
    ],
)
def test_bad_input_is_named_before_a_figure_is_made(call, message):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with pytest.raises(tn.InputError, match=message):
        call()
    assert plt.get_fignums() == before
