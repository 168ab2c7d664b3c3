"""Operators as text: what ``print`` shows."""

import numpy as np
import pytest

import tnmoe as tn
from tests.matrices import LIBRARIES, to_library

SHAPE = tn.MPOShape((4, 16, 4), (3, 4, 30))


def drawn(operator):
    heading, *lines = str(operator).split("\n")
    assert heading == repr(operator)
    assert len(lines) == 3
    return lines


@pytest.mark.parametrize("library", LIBRARIES)
def test_legs_stand_above_and_below_the_cores_and_bonds_between(library):
    mpo = tn.MPO.random(SHAPE, (12, 9), rng=0, like=to_library(np.zeros(()), library))
    assert drawn(mpo) == [
        "4    16   4",
        "●─12─●──9─●",
        "3    4    30",
    ]


def test_the_centre_is_a_square():
    mpo = tn.MPO.random(SHAPE, 9, rng=0)
    for site in range(3):
        marks = [mark for mark in drawn(mpo.canonicalize(site))[1] if mark in "●■"]
        assert marks == ["■" if each == site else "●" for each in range(3)]


def test_cores_that_experts_own_are_hollow():
    mpo = tn.MPO.random(SHAPE, 9, rng=0).canonicalize(1)
    assert drawn(tn.SharedMPO.replicate(mpo, 4))[1] == "○─9─■──9─○"
    assert drawn(tn.SharedMPO.replicate(mpo, 4, shared_sites={0}))[1] == "●─9─□──9─○"


def test_a_single_core_has_no_bonds():
    assert drawn(tn.MPO.random(tn.MPOShape((1000,), (7,)))) == ["1000", " ●", " 7"]


@pytest.mark.parametrize("sites", [2, 24, 25, 60, 100])
@pytest.mark.parametrize("bond", [3, 1234])
def test_a_long_chain_fits_100_columns_and_says_how_many_sites_it_leaves_out(sites, bond):
    cores = [np.broadcast_to(0.0, (bond, 2, 2, bond)) for _ in range(sites)]
    cores[0], cores[-1] = cores[0][:1], cores[-1][..., :1]
    lines = drawn(tn.MPO(cores))
    assert max(map(len, lines)) <= 100
    shown = lines[1].count("●")
    assert lines[0].count("2") == lines[2].count("2") == shown
    assert shown == sites or f"⋯ {sites - shown} sites ⋯" in lines[1]
    assert lines[1].count(f"─{bond}─") in (shown, shown - 1)


def test_messages_quote_an_operator_on_one_line():
    shared = tn.SharedMPO.from_base(tn.MPO.random(SHAPE, 9, rng=0), 2, rng=0)
    assert "\n" not in repr(shared)
    assert "\n" not in f"{[shared.base]}"
