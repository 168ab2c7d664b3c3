"""The demo as a user runs it: a tiny real model, real files, and processes where they matter."""

import json
import os
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.command import TNMOE, tnmoe
from tnmoe.demo import run
from tnmoe.demo.data import packaged_model


def in_new_process(*arguments: object, **details) -> subprocess.CompletedProcess:
    return subprocess.run(
        [TNMOE, *map(str, arguments)], capture_output=True, text=True, check=False, **details
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A BERT of two narrow layers with MiniLM's tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_model(), local_files_only=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """Sentences whose label shows in one word."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    rows = [f"the film of {n} was {'a joy' if n % 2 else 'a bore'},{n % 2}" for n in range(200)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


# Five processes, which import torch and transformers: its tests are slow.
@pytest.fixture(scope="session")
def demo(tmp_path_factory, tiny_model, sentences) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "out"
    done = in_new_process(
        "demo", "--model", tiny_model, "--data", sentences, "--output", output,
        "--steps", 6, "--experts", 3, "--batch-size", 8, "--mask-probability", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (output.parent / "stderr").write_bytes(done.stderr.encode())
    return output, done.stdout


@pytest.mark.slow
def test_the_demo_prints_counts_the_comparison_and_a_verdict(demo):
    _, printed = demo
    assert "180 sentences to train on, 20 held out" in printed
    assert "relative difference" in printed
    for line in ("whole model", "dense", "MoE", "MPOE", "Lowest held-out loss"):
        assert line in printed


@pytest.mark.slow
def test_a_log_holds_lines_and_no_progress_bars(demo):
    output, printed = demo
    assert "\r" not in printed
    assert (output.parent / "stderr").read_bytes() == b""


@pytest.mark.slow
def test_the_report_agrees_with_the_models(demo, tiny_model):
    report = json.loads((demo[0] / "report.json").read_text())
    assert report["function_preservation"]["relative_difference"] <= 1e-4
    assert report["function_preservation"]["reloaded_max_abs"] <= 1e-5
    dense, moe, mpoe = report["results"]
    assert [dense["model"], moe["model"], mpoe["model"]] == ["dense", "MoE", "MPOE"]
    total = report["parameters"]["total"]
    assert [dense["parameters"], moe["parameters"], mpoe["parameters"]] == [
        total["dense"], total["moe"], total["mpoe"],
    ]  # fmt: skip
    # All three start as the same function.
    for result in (moe, mpoe):
        assert result["before"]["loss"] == pytest.approx(dense["before"]["loss"], abs=1e-5)
        assert np.array(result["expert_load"]).sum(-1) == pytest.approx([1, 1])
    assert all(len(result["training_losses"]) == 6 for result in (dense, moe, mpoe))
    assert 0 < mpoe["masked_steps"] < 6


@pytest.mark.slow
def test_the_pictures_are_pictures(demo):
    for name in ("loss_curves", "expert_load", "schmidt_spectra"):
        assert (demo[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layout", ["hidden", "residual"])
def test_the_demo_knows_layouts_that_decompose_nothing(
    layout, tiny_model, sentences, tmp_path, monkeypatch
):
    # New processes take most of the time, and layouts do not depend on them.
    monkeypatch.setattr(run, "run_in_new_process", lambda function, *given: function(*given))
    tnmoe(
        "demo", "--model", tiny_model, "--data", sentences, "--output", tmp_path / "out",
        "--steps", 1, "--experts", 3, "--top-k", 2, "--batch-size", 8, "--layout", layout,
    )  # fmt: skip
    made = set(os.listdir(tmp_path / "out"))
    assert made >= {"report.json", "loss_curves.png", "expert_load.png", "model"}
    assert "schmidt_spectra.png" not in made
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["options"]["layout"] == layout
    assert report["function_preservation"]["relative_difference"] <= 1e-4


@pytest.mark.slow
def test_the_checkpoint_is_a_hugging_face_folder_with_what_was_trained(demo):
    folder = demo[0] / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    import tnmoe.hf  # teaches transformers to load it

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    report = json.loads((demo[0] / "report.json").read_text())
    assert model.num_parameters() == report["results"][2]["parameters"]
    assert model.config.id2label == {0: "0", 1: "1"}
    stored = tnmoe.hf.config_of(model)
    assert (stored.balance_weight, stored.z_weight) == (0.01, 0.001)


def test_help_and_version_answer():
    assert "demo" in in_new_process("--help").stdout
    assert "--mask-probability" in tnmoe("demo", "--help").stdout
    assert tnmoe("--version").stdout.startswith("tnmoe 0.")


def no_known_ffn(folder: Path) -> Path:
    config = transformers.EsmConfig(
        vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=16, pad_token_id=0, mask_token_id=103,
    )  # fmt: skip
    transformers.EsmModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_model(), local_files_only=True).save_pretrained(folder)
    return folder


def copy_of(tiny: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-r", tiny, folder], check=True)
    return folder


def truncated(tiny: Path, folder: Path) -> Path:
    weights = copy_of(tiny, folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def with_nan(tiny: Path, folder: Path) -> Path:
    model = transformers.BertModel.from_pretrained(tiny)
    model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    model.save_pretrained(copy_of(tiny, folder))
    return folder


def without_weights(tiny: Path, folder: Path) -> Path:
    (copy_of(tiny, folder) / "model.safetensors").unlink()
    return folder


def two_columns_missing(path: Path) -> Path:
    path.write_text("review,stars\nfine,4\n")
    return path


def a_file(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda tiny, p: ["--model", p / "none"], "there is no folder"),
        (lambda tiny, p: ["--model", truncated(tiny, p / "m")], "cannot load a model from"),
        (lambda tiny, p: ["--model", without_weights(tiny, p / "m")], "cannot load a model from"),
        (lambda tiny, p: ["--model", no_known_ffn(p / "m")], "no feed-forward network of a known"),
        (lambda tiny, p: ["--model", with_nan(tiny, p / "m")], "contains NaN or infinity"),
        (lambda tiny, p: ["--data", p / "none.csv"], "cannot read"),
        (lambda tiny, p: ["--data", two_columns_missing(p / "d.csv")], "columns text and label"),
        (lambda tiny, p: ["--output", a_file(p / "f")], "is a file, not a folder"),
        (lambda tiny, p: ["--output", a_file(p / "f") / "out"], "cannot write to"),
        (lambda tiny, p: ["--output", "/proc/out"], "cannot write to /proc/out"),
        (lambda tiny, p: ["--output", tiny], "is not empty"),
        (lambda tiny, p: ["--experts", 2, "--top-k", 3], "exceeds num_experts=2"),
        (lambda tiny, p: ["--device", "abacus"], "torch has no device 'abacus' here"),
        (lambda tiny, p: ["--steps", "-1"], "expected an integer from 0 up, got '-1'"),
        (lambda tiny, p: ["--mask-probability", "2"], "expected a number from 0 to 1"),
        (lambda tiny, p: ["--magic"], "unrecognized arguments: --magic"),
        (lambda tiny, p: ["--output", p / "none" / "x", "--data", p / "no"], "cannot read"),
    ],
)
def test_bad_input_gets_one_message_exit_code_2_and_writes_nothing(
    tmp_path, tiny_model, sentences, arguments, message
):
    given = arguments(tiny_model, tmp_path)
    for flag, value in (
        ("--model", tiny_model), ("--data", sentences), ("--output", tmp_path / "out"),
        ("--steps", 1),
    ):  # fmt: skip
        if flag not in given:
            given = [*given, flag, value]
    before = sorted(path for path in tmp_path.rglob("*") if path.name != "none")
    done = tnmoe("demo", *given, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("tnmoe")
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "none") == before


@pytest.mark.slow
def test_a_process_that_gets_bad_input_prints_nothing_but_the_message(
    tmp_path, tiny_model, sentences
):
    """Nor do the libraries that it loads."""
    done = in_new_process(
        "demo", "--model", truncated(tiny_model, tmp_path / "model"), "--data", sentences,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("tnmoe: cannot load a model from")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, tiny_model, sentences, monkeypatch):
    def only_what_writes(function, job):  # the process that fine-tunes MPOE writes the checkpoint
        return apart(function, job) if job.kind == "MPOE" else function(job)

    apart = run.run_in_new_process
    monkeypatch.setattr(run, "run_in_new_process", only_what_writes)
    # A limit on the size of files acts where a full disk would. New processes inherit it.
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    try:
        done = tnmoe(
            "demo", "--model", tiny_model, "--data", sentences, "--output", tmp_path / "out",
            "--steps", 1, code=2,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write the checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_command_is_required():
    done = tnmoe(code=2)
    assert "COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("delay", "send"),
    [
        (1, os.killpg),  # Ctrl-C in a terminal, while the fine-tuning process is starting
        pytest.param(8, os.killpg, marks=pytest.mark.slow),  # … while it trains
        pytest.param(8, os.kill, marks=pytest.mark.slow),  # a signal to the command alone
    ],
)
def test_interrupting_leaves_no_folder_and_no_traceback(
    tmp_path, tiny_model, sentences, delay, send
):
    output = tmp_path / "out"
    process = subprocess.Popen(
        [TNMOE, "demo", "--model", tiny_model, "--data", sentences, "--output", output,
         "--steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A test run in the background ignores SIGINT, and its children would too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        # The parameter report is printed once the first fine-tuning is about to start.
        assert any("whole model" in line for line in process.stdout)
        time.sleep(delay)
        send(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in errors
    assert "Traceback" not in errors
    assert "leaked" not in errors
    assert os.listdir(tmp_path) == []
