"""An MPOEConfig refuses wrong data, such as a file written by hand, and survives JSON."""

import json
from dataclasses import replace

import pytest
import torch

import tnmoe as tn
from tests.hf.families import make
from tnmoe import hf


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shapes": [{"out_dims": [4, 4]}]}, "shapes must be a list of objects with out_dims and"),
        ({"shapes": 3}, "shapes must be a list of objects with out_dims and in_dims, got 3"),
        ({"router": 5}, "router must be a mapping, got 5"),
        ({"matrices": 5}, "matrices must be some of up, gate, down, got 5"),
        ({"matrices": [["up"]]}, "matrices must be some of up, gate, down"),
        ({"layers": 5}, "layers must be integers or a regular expression, got 5"),
        ({"layers": [0.5]}, r"every layer of layers=\[0.5\] must be an integer of at least 0"),
        ({"layers": [-1]}, r"every layer of layers=\[-1\] must be an integer of at least 0"),
        ({"layers": "("}, r"layers='\(' is not a regular expression"),
        ({"shared_sites": 7}, "shared_sites must be a name or the numbers of sites, got 7"),
        ({"shared_sites": "typo"}, "shared_sites must be one of center, none or sites, got 'typo'"),
        ({"shared_sites": {"up": [1.5]}}, r"every site of shared_sites=\[1.5\] must be an integer"),
        ({"common_bias": "no"}, "common_bias must be one of False, True, got 'no'"),
        ({"every": 0}, "every must be a positive integer, got 0"),
    ],
)
def test_bad_data_are_named(entries, message):
    with pytest.raises(tn.InputError, match=message):
        hf.MPOEConfig.from_dict(entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sites": 1}, "sites must be at least 2"),
        ({"sites": 101}, "sites must be at most 100, got 101"),
        ({"layout": "split", "sites": 3}, "sites is for layout='interleaved' and 'residual', got"),
        ({"layout": "hidden", "sites": 2}, "sites=2 with layout='hidden', where group_size makes"),
        ({"group_size": 8}, "group_size is for layout='split' and 'hidden', got group_size=8"),
        ({"layout": "residual", "group_size": [8]}, r"group_size=\(8,\) with layout='residual'"),
        ({"layout": "hidden", "group_size": []}, "group_size must be a number or several, got non"),
        ({"layout": "hidden", "group_size": [8, 0]}, r"every group of group_size=\[8, 0\] must be"),
        ({"layout": "hidden", "group_size": "8"}, "group_size must be a positive integer, got '8'"),
        ({"layout": "hidden", "group_size": None}, "group_size must be a positive integer, got N"),
        ({"bond_ratio": 2}, "bond_ratio enlarges the exact bonds of layout='hidden' and 'split'"),
        ({"layout": "residual", "bond_ratio": 2}, "got bond_ratio=2.0, layout='residual'"),
        ({"layout": "hidden", "bond_ratio": 2, "max_bond": 8}, "max_bond=8"),
        ({"layout": "split", "bond_ratio": 2, "max_bond": {"gate": 8}}, "max_bond=8"),
        ({"layout": "split", "bond_ratio": 9}, "bond_ratio must be at most num_experts=8, .* 9.0"),
        ({"layout": "hidden", "bond_ratio": 0.5}, r"bond_ratio must be in \[1, inf\), got 0.5"),
        ({"layout": "hidden", "shared_sites": "none"}, "share their central core and nothing else"),
        ({"layout": "hidden", "shared_sites": {"up": [0]}}, r"nothing else, got shared_sites=\(0,"),
    ],
)
def test_settings_that_a_layout_cannot_use_are_named(entries, message):
    with pytest.raises(tn.InputError, match=message):
        hf.MPOEConfig(**entries)


def test_an_ordinary_mixture_ignores_the_settings_of_mpos():
    config = hf.MPOEConfig(layout="hidden", group_size=[8, 2], bond_ratio=2)
    assert replace(config, layout="dense").group_size == (8, 2)
    assert hf.MPOEConfig(layout="hidden", shared_sites="center", max_bond=4).max_bond == 4
    truncated = {"max_bond": {"gate": 8}, "matrices": ["up", "down"]}
    assert hf.MPOEConfig(layout="split", bond_ratio=2, **truncated).bond_ratio == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layout": "hidden", "group_size": [7]}, "7, which does not divide out_features=40"),
        ({"layout": "hidden", "group_size": 7}, "has no groups for a 40×24 matrix"),
        ({"layout": "hidden", "shapes": {(40, 24): tn.MPOShape((10, 4), (4, 6))}}, "all input leg"),
        ({"layout": "residual", "sites": 2, "shared_sites": [0, 1]}, "share all 2 sites"),
        ({"layout": "residual", "shared_sites": {"up": [5]}}, "0 to 1, got 5"),
    ],
)
def test_what_only_the_matrices_show_is_named_before_anything_changes(config, message):
    model = make("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(tn.InputError, match=message):
        hf.upcycle(model, hf.MPOEConfig(num_experts=2, **config))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
    assert len(hf.find_ffns(model)) == 3


def test_layers_by_the_thousand_are_no_more_work_than_they_are():
    layers = list(range(20_000))
    assert hf.MPOEConfig(layers=layers).layers == tuple(layers)
    with pytest.raises(tn.InputError, match="got -1") as caught:
        hf.MPOEConfig(layers=[*layers, -1])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a{" + "9" * 30 + "}", "[" + "a" * 10**5])
def test_what_is_no_regular_expression_is_named(pattern):
    with pytest.raises(tn.InputError, match="is not a regular expression") as caught:
        hf.MPOEConfig(layers=pattern)
    assert len(str(caught.value)) < 1000


def test_experts_have_a_number_that_a_router_can_have():
    assert hf.MPOEConfig(num_experts=2**20).num_experts == 2**20
    with pytest.raises(tn.InputError, match="num_experts must be at most 1048576"):
        hf.MPOEConfig(num_experts=10**400)


def test_shapes_are_shapes():
    with pytest.raises(tn.InputError, match=r"shapes\[\(2, 2\)\] must be an MPOShape, got 'x'"):
        hf.MPOEConfig(shapes={(2, 2): "x"})
    with pytest.raises(tn.InputError, match="shapes must be a mapping"):
        hf.MPOEConfig(shapes=[tn.MPOShape((2,), (2,))])


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"layers": [3, 1], "matrices": ["up"], "shared_sites": {"up": {1, 0}, "down": "none"}},
        {
            "layers": {2},
            "matrices": iter(["down"]),
            "shared_sites": range(2),
            "max_bond": {"up": 8},
        },
        {"layout": "hidden", "group_size": iter([8, 2]), "bond_ratio": 2},
        {"layout": "split", "group_size": 8, "bond_ratio": 1.5},
        {"layout": "residual", "sites": 4, "max_bond": 3, "shared_sites": {"down": [1]}},
        {"layers": "block", "shapes": {(4, 6): tn.MPOShape((2, 2), (2, 3))}},
        {"num_experts_per_tok": 2, "router": {"jitter_noise": 0.1}},
    ],
)
def test_a_stored_configuration_is_equal_to_the_one_that_was_stored(entries):
    config = hf.MPOEConfig(**entries)
    assert hf.MPOEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configurations_survive_json():
    config = hf.MPOEConfig(
        num_experts=4,
        layers=(0, 2),
        max_bond=7,
        shapes={(40, 24): tn.MPOShape((10, 4), (4, 7), in_features=24)},
        mask_probability=0.5,
    )
    again = hf.MPOEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.shapes == config.shapes
