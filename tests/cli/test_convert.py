"""``tnmoe inspect``, ``upcycle`` and ``export``: real files, and processes where it matters."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tnmoe as tn
from tnmoe import hf
from tnmoe.cli import main
from tnmoe.system.unfinished import UnfinishedFolder

TNMOE = str(Path(sys.executable).parent / "tnmoe")


def tnmoe(*arguments, code=0):
    """Run the command in this process: importing torch again takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            returned = main([*map(str, arguments)])
        except SystemExit as stopped:
            returned = stopped.code
    assert returned == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mpoe(dense, tmp_path_factory):
    target = tmp_path_factory.mktemp("mpoe") / "model"
    done = tnmoe("upcycle", dense, target, "--experts", 4, "--top-k", 2, "--sites", 3,
                 "--shard-size", "50KB", "--seed", 3)  # fmt: skip
    return target, done


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
    assert written == planned | {"files": ["model.safetensors"]}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert written["parameters"]["target"] == sum(p.numel() for p in model.parameters())
    assert written["bytes"]["target"] == 4 * written["parameters"]["target"]


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


def counts(model, config):
    return json.loads(json.dumps(hf.parameter_report(model, config).to_dict()))


def test_numbers_in_a_file_may_be_integers(dense, tmp_path):
    given = tmp_path / "config.json"
    given.write_text('{"num_experts": 4, "sites": 3, "balance_weight": 0, "expert_noise": 1}')
    tnmoe("upcycle", dense, tmp_path / "mpoe", "--config", given, "--z-weight", 1)
    tnmoe("export", tmp_path / "mpoe", tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.config.router_aux_loss_coef == 0


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
    shape = config.shape_for(*weight.shape)
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


def test_a_terminal_sees_how_far_it_is(dense, tmp_path):
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [TNMOE, "upcycle", dense, tmp_path / "target", "--sites", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side) as process:
        os.close(side)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the other side has closed
            pass
        process.communicate()
    assert process.returncode == 0
    assert b"converting: 100%" in shown
    assert b"00:00<" in shown  # the time that is left stands behind it


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A folder that takes a second or two, and what it becomes undisturbed."""
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


def pipe(path):
    os.mkfifo(path)
    return path


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"12")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda d, t: ["upcycle", d / "absent", t], "there is no folder"),
        (lambda d, t: ["upcycle", d, d], "is, holds or lies in the source"),
        (lambda d, t: ["upcycle", d, t, "--dry-run", "--layers", "encoder"], "leave none of the 3"),
        (lambda d, t: ["upcycle", d, t, "--layers", "3"], "layers must be from 0 to 2"),
        (lambda d, t: ["upcycle", d, t, "--experts", "2", "--top-k", "3"], "exceeds num_experts"),
        (lambda d, t: ["upcycle", d, t, "--config", d / "absent.json"], "No such file"),
        (lambda d, t: ["upcycle", d, t, "--config", d / "config.json"], "unknown entries in an"),
        (lambda d, t: ["export", d, t], "is not an MPOE checkpoint"),
        (lambda d, t: ["upcycle", d, t, "--sites", "1000"], "sites must be at most 100, got 1000"),
        (lambda d, t: ["inspect", d, "--experts", "9" * 5000], "expected an integer from 1 up"),
        (lambda d, t: ["upcycle", d, t, "--config", pipe(d / "pipe")], "pipe is not JSON"),
        (lambda d, t: ["inspect", d, "--bonds", "4,0"], "expected an integer from 1 up"),
        (lambda d, t: ["upcycle", d, t, "--shard-size", "5"], "expected a size like 5GB"),
        (lambda d, t: ["upcycle", d, t, "--shard-size=-1GB"], "expected a positive number"),
        (lambda d, t: ["upcycle", d, t, "--shard-size", "1e-9KB"], "expected a size like 5GB"),
        (lambda d, t: ["upcycle", d, t, "--seed", 2**64], "expected an integer of 64 bits"),
        (lambda d, t: ["demo", "--seed", 2**64], "expected an integer of 64 bits"),
        (lambda d, t: ["inspect", damaged(d)], "is damaged or no safetensors file"),
        (lambda d, t: ["upcycle", damaged(d), t], "is damaged or no safetensors file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, dense, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in dense.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    done = tnmoe(*arguments(source, tmp_path / "target"), code=2)
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0 or "usage:" in done.stderr
    assert "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
    assert done.stdout == ""


def test_an_error_without_a_text_is_told_by_its_name(dense, monkeypatch, capsys):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(hf, "inspect_checkpoint", fail)
    assert main(["inspect", str(dense)]) == 2
    assert capsys.readouterr().err == "tnmoe: TimeoutError\n"
