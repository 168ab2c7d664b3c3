"""Loads are drawn step by step, or as means where there are many steps."""

import numpy as np
import pytest

from tests.plot.drawings import axes, texts
from tnmoe import plot


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
