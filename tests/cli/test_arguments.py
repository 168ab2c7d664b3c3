"""Settings come from a file and from the command line, which overrides the file."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.command import tnmoe


def test_settings_come_from_a_file_and_from_the_command_line_first(dense, tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({"num_experts": 4, "sites": 3, "max_bond": {"up": 4}, "layers": [0, 2]})
    )
    target = tmp_path / "target"
    tnmoe("upcycle", dense, target, "--config", tmp_path / "c.json", "--experts", 2,
          "--layers", r"layers\.[12]$")  # fmt: skip
    stored = json.loads((target / "config.json").read_text())["tnmoe"]["config"]
    assert stored["num_experts"] == 2
    assert stored["max_bond"] == {"up": 4}
    assert stored["layers"] == r"layers\.[12]$"
    tnmoe("upcycle", dense, target, "--layers", "0,1", "--sites", 3, "--matrices", "up,down",
          "--overwrite")  # fmt: skip
    stored = json.loads((target / "config.json").read_text())["tnmoe"]["config"]
    assert stored["layers"] == [0, 1]
    assert stored["matrices"] == ["up", "down"]


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        (["--layout", "hidden"], {"layout": "hidden", "group_size": 64, "sites": None}),
        (
            ["--layout", "hidden", "--group-size", "8,2", "--bond-ratio", "1.5"],
            {"group_size": [8, 2], "bond_ratio": 1.5},
        ),
        (["--layout", "split", "--group-size", "8"], {"group_size": 8}),
        (["--layout", "residual"], {"layout": "residual", "sites": None, "max_bond": None}),
        (["--layout", "residual", "--sites", "4", "--max-bond", "3"], {"sites": 4, "max_bond": 3}),
    ],
)
def test_layouts_around_a_module_are_options_and_keep_the_function(
    options, entries, dense, tmp_path
):
    target = tmp_path / "target"
    planned = tnmoe("upcycle", dense, target, "--experts", 4, *options, "--dry-run", "--json")
    made = tnmoe("upcycle", dense, target, "--experts", 4, *options, "--json")
    planned, made = json.loads(planned.stdout), json.loads(made.stdout)
    assert planned["parameters"] == made["parameters"]
    assert planned["bytes"] == made["bytes"]
    stored = json.loads((target / "config.json").read_text())["tnmoe"]["config"]
    assert stored | entries == stored
    before = AutoModelForCausalLM.from_pretrained(dense).eval()
    after = AutoModelForCausalLM.from_pretrained(target).eval()
    assert made["parameters"]["target"] == after.num_parameters()
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)


def test_numbers_in_a_file_may_be_integers(dense, tmp_path):
    given = tmp_path / "config.json"
    given.write_text('{"num_experts": 4, "sites": 3, "balance_weight": 0, "expert_noise": 1}')
    tnmoe("upcycle", dense, tmp_path / "mpoe", "--config", given, "--z-weight", 1)
    tnmoe("export", tmp_path / "mpoe", tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.config.router_aux_loss_coef == 0
