"""Operators in notebooks: SVG and HTML."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.matrices import LIBRARIES, to_library

SHAPE = tn.MPOShape((4, 6, 4), (3, 4, 1))


def mpo_of(library="numpy"):
    return tn.MPO.random(SHAPE, (12, 1), rng=0, like=to_library(np.zeros(()), library))


def parsed(svg):
    return ElementTree.fromstring(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def labels(svg):
    return [text.text for text in parsed(svg).iter("text")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_picture_has_cores_legs_and_bonds_with_their_dimensions(library):
    mpo = mpo_of(library).canonicalize(1)
    picture = parsed(mpo._repr_svg_())
    assert len(list(picture.iter("circle"))) == 2
    assert len(list(picture.iter("rect"))) == 1  # the centre
    assert len(list(picture.iter("line"))) == 2 * 3 + 2
    numbers = [label for label in labels(mpo._repr_svg_()) if label.isdigit()]
    assert sorted(map(int, numbers)) == sorted([*SHAPE.out_dims, *SHAPE.in_dims, *mpo.bond_dims])


def test_it_has_the_colours_of_the_page():
    svg = tn.SharedMPO.replicate(mpo_of(), 2)._repr_svg_()
    assert set(re.findall(r'(?:stroke|fill)="([^"]*)"', svg)) == {"currentColor", "none"}
    assert "#" not in svg


def test_it_is_described_in_words():
    svg = parsed(tn.SharedMPO.replicate(mpo_of().canonicalize(1), 2)._repr_svg_())
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == svg.find("title").text
    assert svg.get("aria-label") == (
        "A chain of cores, sites=3; output legs above: 4, 6, 4; input legs below: 3, 4, 1; "
        "bonds between them: 12, 1; centre: site 1; sites that every expert owns: 0, 2"
    )


def test_everything_lies_inside_the_picture():
    for sites in (1, 2, 12, 13, 40):
        for leg in (2, 10**6):
            cores = [np.broadcast_to(0.0, (1, leg, 1, 1))] * sites
            picture = parsed(tn.MPO(cores)._repr_svg_())
            left, top, width, height = map(float, picture.get("viewBox").split())
            for name, lowest, size in (("x", left, width), ("y", top, height)):
                found = [
                    float(part.get(key))
                    for part in picture.iter()
                    for key in (name, f"{name}1", f"{name}2", f"c{name}")
                    if part.get(key)
                ]
                assert lowest <= min(found) <= max(found) <= lowest + size


def test_a_long_chain_says_how_many_sites_it_leaves_out():
    mpo = tn.MPO.random(tn.MPOShape((2,) * 40, (1,) * 40), 3, rng=0)
    assert "⋯ 28 sites ⋯" in labels(mpo._repr_svg_())
    assert len(list(parsed(mpo._repr_svg_()).iter("circle"))) == 12


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_page_tabulates_bonds_and_their_entropies(library):
    mpo = tn.MPO.random(SHAPE, 4, rng=0, like=to_library(np.zeros(()), library))
    page = parsed(mpo._repr_html_())
    assert page.find("code").text == repr(mpo)
    assert page.find(".//svg") is not None
    head, *rows = [[cell.text for cell in row] for row in page.iter("tr")]
    assert head == ["bond", "dimension", "exact", "entropy (nats)"]
    for bond, row in enumerate(rows):
        numbers = [bond, mpo.bond_dims[bond], SHAPE.bond_dims()[bond]]
        assert row == [*map(str, numbers), f"{mpo.entropy(bond):.3f}"]
    assert f"S {mpo.entropy(0):.2f}" in labels(mpo._repr_svg_())


def test_entropies_are_left_out_where_they_take_long_or_do_not_exist():
    large = tn.MPO.random(tn.MPOShape((300, 1), (1, 300)), rng=0)
    nan = tn.MPO([np.full((1, 2, 2, 2), np.nan), np.ones((2, 2, 2, 1))])
    meta = tn.MPO([torch.ones(1, 2, 2, 2, device="meta"), torch.ones(2, 2, 2, 1, device="meta")])
    for mpo in (large, nan, meta, tn.SharedMPO.replicate(mpo_of(), 2)):
        assert "entropy" not in mpo._repr_html_()
        assert not any(label.startswith("S ") for label in labels(mpo._repr_svg_()))


def test_a_single_core_has_no_table():
    mpo = tn.MPO.random(tn.MPOShape((5,), (7,)), rng=0)
    assert parsed(mpo._repr_html_()).find(".//table") is None
    assert labels(mpo._repr_svg_()) == ["5", "7"]
