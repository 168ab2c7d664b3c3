"""Settings come from a file and from the command line, which overrides the file."""

import json

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


def test_numbers_in_a_file_may_be_integers(dense, tmp_path):
    given = tmp_path / "config.json"
    given.write_text('{"num_experts": 4, "sites": 3, "balance_weight": 0, "expert_noise": 1}')
    tnmoe("upcycle", dense, tmp_path / "mpoe", "--config", given, "--z-weight", 1)
    tnmoe("export", tmp_path / "mpoe", tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.config.router_aux_loss_coef == 0
