"""A diagram shows the cores, bonds and legs of its operator."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Circle, Rectangle

import tnmoe as tn
from tests.plot.drawings import SHAPE, axes, legend, texts
from tnmoe import plot

SPLIT = tn.MPOShape.split(48, 36, left=8, right=6)


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
