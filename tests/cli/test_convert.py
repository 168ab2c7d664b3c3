"""``tnmoe upcycle`` and ``tnmoe export``: real files, and processes where it matters."""

import json
import os
import signal
import subprocess
import time
from functools import partial

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.cli.command import TNMOE, tnmoe
from tests.terminal import errors_on_terminal
from tnmoe import hf
from tnmoe.system.unfinished import UnfinishedFolder


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def test_a_folder_is_upcycled_and_exported_and_computes_the_same(dense, mpoe, tmp_path):
    target, done = mpoe
    assert done.stderr == ""
    assert "layers      3: model.layers.0.mlp … model.layers.2.mlp" in done.stdout
    dense_model = AutoModelForCausalLM.from_pretrained(dense)
    assert f"source      {sum(p.numel() for p in dense_model.parameters()):,}" in done.stdout
    assert len(list(target.glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(target), logits(dense), rtol=1e-4, atol=1e-5)
    tnmoe("export", target, tmp_path / "moe")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert type(exported) is transformers.MixtralForCausalLM
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=1e-4, atol=1e-5)
    tnmoe("export", target, tmp_path / "back", "--to", "dense")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(dense), rtol=1e-4, atol=1e-5)


def test_the_command_line_does_what_the_library_does(dense, mpoe):
    torch.manual_seed(3)
    config = hf.MPOEConfig(num_experts=4, num_experts_per_tok=2, sites=3)
    expected = hf.upcycle(AutoModelForCausalLM.from_pretrained(dense), config).state_dict()
    made = AutoModelForCausalLM.from_pretrained(mpoe[0]).state_dict()
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(dense, tmp_path):
    target = tmp_path / "target"
    for way in ((), ("--json",)):
        done = tnmoe("upcycle", dense, target, "--dry-run", "--experts", 4, "--sites", 3, *way)
        assert list(tmp_path.iterdir()) == []
    planned = json.loads(done.stdout)
    assert planned["files"] == []
    written = json.loads(
        tnmoe("upcycle", dense, target, "--experts", 4, "--sites", 3, "--json").stdout
    )
    assert written == planned | {"files": ["model.safetensors"], "left": []}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert written["parameters"]["target"] == sum(p.numel() for p in model.parameters())
    assert written["bytes"]["target"] == 4 * written["parameters"]["target"]


def test_a_terminal_sees_how_far_it_is(dense, tmp_path):
    command = [TNMOE, "upcycle", dense, tmp_path / "target", "--sites", "3"]
    shown = errors_on_terminal(command, TERM="xterm")
    assert b"converting: 100%" in shown
    assert b"00:00<" in shown  # the time that is left stands behind it


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model that takes a second or two to convert, and the result without an interruption."""
    folder = tmp_path_factory.mktemp("larger")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=256, num_hidden_layers=24, num_attention_heads=2,
        intermediate_size=768,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tnmoe("upcycle", folder / "dense", folder / "whole")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_stopped_goes_on_with_the_same_command(how, larger, tmp_path):
    target = tmp_path / "target"
    command = [TNMOE, "upcycle", larger / "dense", target, "--jobs", "1"]
    journal = tmp_path / "target.partial" / ".tnmoe-journal"
    # The command gives way to this process, which must not come too late on a busy machine.
    polite = ["nice", "-n", "5", *command]
    with subprocess.Popen(
        polite, stderr=subprocess.PIPE, text=True,
        # A test run in the background ignores SIGINT, and its children would too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        while not (journal.exists() and journal.read_text().count("\n") > 5):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(how)
        _, errors = process.communicate()
    assert not target.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "tnmoe: interrupted; the same command goes on from there\n"
    tnmoe(*command[1:])
    made = {path.name: path.read_bytes() for path in target.iterdir()}
    assert made == {path.name: path.read_bytes() for path in (larger / "whole").iterdir()}


def test_a_command_that_was_stopped_when_all_was_in_place_is_done(dense, tmp_path, monkeypatch):
    command = ["upcycle", dense, tmp_path / "target", "--sites", 3]

    complete = UnfinishedFolder._complete_move

    def stop(self):
        if self.target.exists():
            raise KeyboardInterrupt
        return complete(self)

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedFolder, "_complete_move", stop)
        tnmoe(*command, code=130)
    assert "written" in tnmoe(*command).stdout
    assert os.listdir(tmp_path) == ["target"]
    assert "is not empty" in tnmoe(*command, code=2).stderr


@pytest.mark.parametrize("command", ["upcycle", "export"])
def test_only_what_a_command_wrote_is_overwritten(command, dense, mpoe, tmp_path):
    source = dense if command == "upcycle" else mpoe[0]
    target = tmp_path / "target"
    tnmoe(command, source, target)
    (target / "thesis.txt").write_text("years of work")
    for way in ((), ("--dry-run",)):
        done = tnmoe(command, source, target, "--overwrite", *way, code=2)
        assert "thesis.txt; move it" in done.stderr
    assert (target / "thesis.txt").read_text() == "years of work"
    (target / "thesis.txt").unlink()
    tnmoe(command, source, target, "--overwrite")
    assert os.listdir(tmp_path) == ["target"]
