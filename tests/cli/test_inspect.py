"""``tnmoe inspect``: the numbers of a model's networks and bonds are right."""

import json

import pytest
from transformers import AutoModelForCausalLM

import tnmoe as tn
from tests.cli.command import tnmoe
from tnmoe import hf


def counts(model, config):
    return json.loads(json.dumps(hf.parameter_report(model, config).to_dict()))


def test_inspection_shows_sizes_spectra_and_what_truncation_costs(dense, tmp_path):
    bonds = (2, 6, 1000)
    done = tnmoe("inspect", dense, "--experts", 4, "--sites", 3, "--bonds", "2,6,1000", "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["architecture"] == "LlamaForCausalLM"
    config = hf.MPOEConfig(num_experts=4, sites=3)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert found["parameters"] == counts(model, config)
    assert len(found["matrices"]) == 9
    ffn = hf.find_ffns(model)[1]
    (matrix,) = [each for each in found["matrices"] if each["name"] == "model.layers.1.down"]
    assert matrix["family"] == "gated MLP"
    weight = ffn.down.weight.detach().double()
    shape = config.shape_for("down", *weight.shape)
    assert matrix["bond_dims"] == list(shape.bond_dims())
    mpo = tn.decompose(weight, shape)
    assert matrix["entropies"] == pytest.approx([mpo.entropy(bond) for bond in (0, 1)], abs=1e-3)
    for bond in bonds:
        cut = tn.decompose(weight, shape, max_bond=bond).to_matrix()
        error = float((cut - weight).norm() / weight.norm())
        assert error <= matrix["errors"][str(bond)] + 1e-5
        assert matrix["errors"][str(bond)] <= 1
    assert matrix["errors"]["1000"] < 1e-6 < matrix["errors"]["6"] < matrix["errors"]["2"]
    ordinary = tnmoe("inspect", dense, "--experts", 4, "--layout", "dense").stdout
    assert "whole model" in ordinary
    assert "legs" not in ordinary
    text = tnmoe("inspect", dense, "--experts", 4, "--sites", 3).stdout
    assert "model.layers.2.gate" in text
    assert "entropies" in text


@pytest.mark.parametrize("weights", [True, False])
def test_inspection_tells_the_bonds_that_a_conversion_makes(weights, dense):
    more = [] if weights else ["--no-weights"]
    for options, settings in (
        (["--layout", "hidden"], {}),
        (["--layout", "hidden", "--group-size", "4,2"], {"group_size": [4, 2]}),
        (["--layout", "hidden", "--bond-ratio", "2"], {"bond_ratio": 2}),
        (["--layout", "hidden", "--max-bond", "3"], {"max_bond": 3}),
        (["--layout", "residual"], {}),
        (["--layout", "residual", "--sites", "4"], {"sites": 4}),
    ):
        found = json.loads(
            tnmoe("inspect", dense, "--experts", 4, *options, *more, "--json").stdout
        )
        config = hf.MPOEConfig(num_experts=4, layout=options[1], **settings)
        model = AutoModelForCausalLM.from_pretrained(dense)
        assert found["parameters"] == counts(model, config)
        hf.upcycle(model, config)
        for matrix in found["matrices"]:
            layer, _, part = matrix["name"].rpartition(".")
            experts = model.get_submodule(layer).mlp.experts
            projection = getattr(experts, part)
            mpo = projection.expert(0)
            assert tuple(matrix["bond_dims"]) == mpo.bond_dims
            assert tuple(matrix["shape"]["out_dims"]) == mpo.shape.out_dims
            # Nothing of a residual matrix is decomposed.
            is_measured = weights and options[1] == "hidden"
            assert (matrix["errors"] is not None) == is_measured
        text = tnmoe("inspect", dense, "--experts", 4, *options, *more).stdout
        assert ("entropies" in text) == (weights and options[1] == "hidden")


@pytest.mark.parametrize("way", ["file", "no weights"])
def test_a_configuration_is_enough_for_the_counts(way, dense, tmp_path):
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    path = tmp_path / "config.json" if way == "file" else tmp_path
    more = [] if way == "file" else ["--no-weights"]
    found = json.loads(tnmoe("inspect", path, "--sites", 3, "--json", *more).stdout)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert found["parameters"] == counts(model, hf.MPOEConfig(sites=3))
    assert found["matrices"][0]["entropies"] is None
    assert "entropies" not in tnmoe("inspect", path, "--sites", 3, *more).stdout
