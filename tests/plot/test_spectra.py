"""Spectra and entropies are those of the bonds, zero and rounding included."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.plot.drawings import SHAPE, axes, legend
from tnmoe import plot


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
        # Values of rounding lie on zero, larger values a tenth of the axis or more above it.
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
    assert most.get_label() == "upper limit: log(bond dimension)"


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


@pytest.mark.parametrize("name", [None, "up"])
def test_every_expert_of_a_mixture_is_drawn(name):
    mpo = tn.MPO.random(tn.MPOShape((4, 4, 3), (3, 4, 3)), max_bond=6, rng=0)
    shared = tn.SharedMPO.replicate(mpo, 2, noise=0.5, rng=0)
    given = shared if name is None else {name: shared}
    experts = {f"expert {index}": shared.expert(index) for index in range(2)}
    spectra, expected = (plot.schmidt_spectra(each, axes()) for each in (given, experts))
    for line, other in zip(spectra.lines, expected.lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), other.get_ydata())
    lines = plot.entropy(given, axes()).lines
    for index, expert in enumerate(experts.values()):
        values = [expert.entropy(bond) for bond in range(2)]
        np.testing.assert_allclose(lines[index].get_ydata(), values)
    prefix = "" if name is None else f"{name}, "
    assert legend(spectra) == [
        f"{prefix}expert {index}, bond {bond} (dimension 6)"
        for index in range(2)
        for bond in range(2)
    ]
