"""A diagram shows the cores, bonds and legs of its operator."""

import numpy as np
import pytest
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
    st.sampled_from(["shape", "mpo", "shared", "base"]),
    st.integers(1, 32),
    st.data(),
)
def test_a_network_has_its_cores_bonds_and_legs(legs, kind, experts, data):
    shape = tn.MPOShape(*zip(*legs, strict=True))
    operator = mpo = shape if kind == "shape" else tn.MPO.random(shape, max_bond=3, rng=0)
    owned = set()
    if kind in ("shared", "base"):
        owned = data.draw(st.sets(st.integers(0, shape.sites - 1), min_size=1))
        operator = tn.SharedMPO.replicate(mpo, experts, set(range(shape.sites)) - owned)
    bonds = shape.bond_dims(None if kind == "shape" else 3)
    if kind == "base":
        operator = tn.SharedMPO(operator.cores, shape, base=mpo)
    ax = plot.network(operator, axes())

    squares, circles = nodes(ax)
    chains = 2 if kind == "base" else 1
    behind = min(experts, 3) - 1  # cores in a stack behind the first
    central = shape.center_site in owned
    assert len(squares) == chains + behind * central
    assert len(circles) == chains * (shape.sites - 1) + behind * (len(owned) - central)
    assert len(ax.lines) == chains * (3 * shape.sites - 1)
    expected = [
        *chains * [str(dim) for dim in (*bonds, *range(shape.sites))],
        *chains * [str(dim) for leg in legs for dim in leg if dim > 1],
        *[f"×{experts}"] * len(owned),
        *(["+", "base"] if kind == "base" else []),
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


@pytest.mark.parametrize(
    ("shared_sites", "expected"),
    [
        ((0,), ["central core, one per expert", "auxiliary cores, shared",
                "auxiliary cores, one per expert"]),
        ((0, 1), ["central core, shared", "auxiliary cores, shared",
                  "auxiliary cores, one per expert"]),
        ((0, 2), ["central core, one per expert", "auxiliary cores, shared"]),
        ("none", ["central core, one per expert", "auxiliary cores, one per expert"]),
    ],
)  # fmt: skip
def test_the_legend_names_what_is_shared_and_what_is_owned(shared_sites, expected):
    shared = tn.SharedMPO.replicate(tn.MPO.random(SPLIT, rng=0), 4, shared_sites)
    ax = plot.network(shared, axes())
    assert legend(ax) == expected
    squares, circles = nodes(ax)
    fronts = {patch.get_center()[0]: patch.get_facecolor() for patch in [*squares, *circles]
              if patch.get_zorder() == 3}  # fmt: skip
    shares = {fronts[site] for site in shared.shared_sites}
    owns = {fronts[site] for site in set(range(3)) - shared.shared_sites}
    assert (len(shares), len(owns)) == (min(len(shared.shared_sites), 1), 1)
    assert not shares & owns


def test_a_base_stands_left_of_the_chain_that_is_added_to_it():
    base = tn.MPO.random(tn.MPOShape((48,), (36,)), rng=0)
    ax = plot.network(tn.SharedMPO.from_base(base, 4, max_bond=5, rng=0), axes())
    assert ax.get_title().startswith("4 experts of 48 × 36, 2 sites and a base\n")
    plus = next(text for text in ax.texts if text.get_text() == "+")
    assert plus.get_position() == (0.5, 0)
    bond = next(text for text in ax.texts if text.get_text() == "5")
    assert bond.get_position()[0] == 1.5
    assert legend(ax)[0] == "central core, shared"


def test_a_new_figure_grows_with_the_sites():
    import matplotlib.pyplot as plt

    widths = []
    for sites in (1, 5, 20):
        ax = plot.network(tn.MPOShape((2,) * sites, (2,) * sites))
        widths.append(ax.figure.get_figwidth())
        plt.close(ax.figure)
    assert widths[0] < widths[1] < widths[2]
