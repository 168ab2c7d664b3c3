"""Dimension squeezing: the cheapest bond first, until the score falls."""

import numpy as np
import pytest

import tnmoe as tn
from tests.operators import SHAPE, a_mpo
from tnmoe.chains import canonical


def test_squeezing_shrinks_the_cheapest_bond_until_the_score_falls():
    matrix = np.random.default_rng(0).standard_normal((36, 36))
    mpos = {"big": tn.decompose(matrix, SHAPE), "small": tn.decompose(0 * matrix, SHAPE)}
    scores = []

    def score(candidates):
        error = np.linalg.norm(candidates["big"].to_matrix() - matrix) / np.linalg.norm(matrix)
        scores.append(1 - error)
        return 1 - error

    result = tn.squeeze(mpos, score, threshold=0.7)
    assert result.score >= 0.7 > scores[-1]
    assert result.mpos["small"].bond_dims == (1, 1, 1)
    assert result.mpos["big"].num_params < mpos["big"].num_params
    assert [step.score for step in result.steps] == scores[1:-1]
    # Step by step the cheapest: no bond could have been shrunk at a smaller error.
    first = result.steps[0]
    for bond, dim in enumerate(mpos["big"].bond_dims):
        values = mpos["big"].schmidt_values(bond)
        tail = np.linalg.norm(values[int(0.9 * dim) :]) / np.linalg.norm(values)
        assert first.error <= tail + 1e-12


def test_squeezing_stops_at_the_smallest_bond_and_at_the_step_limit():
    mpos = {"w": tn.MPO.random(SHAPE, 4, rng=0)}
    assert tn.squeeze(mpos, lambda _: 1.0, 0.0, min_bond=3).mpos["w"].bond_dims == (3, 3, 3)
    assert len(tn.squeeze(mpos, lambda _: 1.0, 0.0, max_steps=2).steps) == 2


def test_squeezing_a_longer_chain_takes_work_in_proportion(monkeypatch):
    moves = []
    for name in ("shift_left", "shift_right"):
        shift = getattr(canonical, name)
        monkeypatch.setattr(
            canonical, name, lambda *args, shift=shift: moves.append(1) or shift(*args)
        )
    counts = []
    for sites in (10, 40):
        legs = [2] * 4 + [1] * (sites - 8) + [2] * 4
        mpo = tn.MPO.random(tn.MPOShape(legs, legs), 3, rng=0)
        tn.squeeze({"w": mpo}, lambda _: 1.0, 0.0, max_steps=2)
        counts.append(len(moves))
        moves.clear()
    assert 0 < counts[1] <= 6 * counts[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.squeeze({"w": a_mpo()}, lambda _: 0.0, 1.0), "from the start"),
        (lambda: tn.squeeze({"w": a_mpo()}, lambda _: np.nan, 1.0), "finite number"),
        (
            lambda: tn.squeeze({}, lambda _: 1.0, 0.0, factor=1),
            r"factor must be in \(0, 1\), got 1",
        ),
        (
            lambda: tn.squeeze({"w": a_mpo()}, lambda _: 1.0, np.nan),
            "threshold must be in .*, got nan",
        ),
        (
            lambda: tn.squeeze({"w": a_mpo()}, lambda _: 1.0, 0.0, max_steps=1.5),
            "max_steps must be an integer of at least 0, got 1.5",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()
