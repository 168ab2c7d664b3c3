"""Settings run completely, resume after any end, and appear in reports."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import costs, curves, training
from experiments.__main__ import main
from experiments.folder import SettingFolder, read, write
from experiments.report import rows, write_report
from experiments.schedule import cost_jobs, run_all, steps_made, total_steps, training_jobs
from tests.experiments.tiny import setting, write_texts
from tnmoe.errors import InputError
from tnmoe.system.locks import locked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    """A setting that has been run."""
    folder = SettingFolder(tmp_path_factory.mktemp("output"), setting(*texts))
    assert run_all([folder], device="cpu", jobs=2, threads=1) == []
    return folder


def without_timings(results):
    return [
        {k: v for k, v in each.items() if k not in ("seconds_per_step", "peak_bytes")}
        for each in results
    ]


def test_every_method_has_every_rate_with_one_seed_and_the_best_with_all(folder):
    runs = {(each["method"], each["learning_rate"], each["seed"]) for each in folder.results()}
    for method in folder.setting.methods:
        best = folder.best_rate(method)
        assert {run for run in runs if run[0] == method} == {
            (method, 1e-3, 0), (method, 4e-3, 0), (method, best, 1),
        }  # fmt: skip
        losses = {
            each["learning_rate"]: each["validation"]["loss"]
            for each in folder.results()
            if each["method"] == method and each["seed"] == 0
        }
        assert best == min(losses, key=losses.get)


def test_all_methods_start_from_the_same_pretrained_model_of_a_seed(folder):
    for seed in range(2):
        before = [each["before"]["loss"] for each in folder.results() if each["seed"] == seed]
        assert before == pytest.approx([before[0]] * len(before), rel=1e-4)
    assert len({round(each["before"]["loss"], 4) for each in folder.results()}) == 2


def test_what_is_done_is_not_done_again(folder):
    stamps = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.json")}
    assert list(training_jobs([folder], "cpu")) == []
    assert run_all([folder], device="cpu", jobs=2, threads=1) == []
    later = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.json")}
    assert {k: v for k, v in later.items() if k.name != "setting.json"} == {
        k: v for k, v in stamps.items() if k.name != "setting.json"
    }


def test_progress_counts_what_an_earlier_command_made(folder):
    assert steps_made(folder) == total_steps(folder.setting) == 2 * 3 + 3 * 3 * 4
    one = SettingFolder(folder.root, folder.setting.with_seeds(1))
    assert total_steps(one.setting) == 3 + 3 * 2 * 4


def test_fewer_seeds_than_choose_the_rate_are_all_that_choose(texts, tmp_path):
    some = replace(setting(*texts, methods=("dense",)), tuning_seeds=2).with_seeds(1)
    folder = SettingFolder(tmp_path, some)
    assert run_all([folder], device="cpu", jobs=2, threads=1) == []
    assert folder.best_rate("dense") is not None
    assert len(folder.results()) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--jobs", "0"], 2, "expected an integer from 1 up, got '0'"),
        (["--seeds", "-1"], 2, "expected an integer from 1 up, got '-1'"),
        (["--settings", "decoder", "encoder"], 2, "no setting encoder; there are decoder, smollm2"),
        (["--device", "abacus"], 1, "torch has no device 'abacus' here"),
        (["--text", "nowhere.txt", "nowhere.txt"], 1, "cannot read nowhere.txt: No such file"),
        (["--output", "FILE/below"], 1, "Not a directory"),
        (["--report-only"], 1, "new holds no results of decoder, smollm2, t5, flan-t5, minilm"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    monkeypatch.setattr(sys, "argv", ["experiments", "--quick", "--output", "new", *arguments])
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint):
        try:
            found = main()
        except SystemExit as stopped:  # argparse's
            found = stopped.code
    assert found == status
    assert message in complaint.getvalue()
    assert "Traceback" not in complaint.getvalue()


def test_tensorboard_is_needed_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    command = ["experiments", "--quick", "--output", str(tmp_path), "--report-only"]
    for arguments, message in (
        ([], "holds no results"),
        (["--tensorboard"], "--tensorboard needs TensorBoard: pip install tensorboard"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        assert main() == 1
        assert message in capsys.readouterr().err


def test_the_first_methods_of_all_settings_come_first(folder, texts, tmp_path):
    one, other = (
        SettingFolder(
            tmp_path,
            replace(setting(*texts, methods=methods), name=name, pretraining=None).with_seeds(1),
        )
        for name, methods in (("one", ("dense", "moe")), ("other", ("mpoe", "mpoe-top2", "moe")))
    )
    jobs = training_jobs([one, other], "cpu")
    assert list(dict.fromkeys(job.name.split(",")[0] for job in jobs)) == [
        "one: dense", "other: mpoe", "one: moe", "other: mpoe-top2", "other: moe",
    ]  # fmt: skip


def test_the_folder_of_another_setting_is_refused(folder, texts):
    other = setting(*texts, steps=5)
    with pytest.raises(InputError, match="holds results of other data, sizes, steps"):
        run_all([SettingFolder(folder.root, other)], "cpu", 1, 1)


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    command = [sys.executable, "-m", "experiments", "--quick", "--output", tmp_path]
    with locked(tmp_path / ".lock", str(tmp_path)):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"{tmp_path} is in use by process {os.getpid()} on " in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_is_named_and_the_others_are_made(texts, tmp_path):
    broken = replace(setting(*texts, methods=("dense", "mpoe")), mixture={"layers": "nowhere"})
    folder = SettingFolder(tmp_path, broken.with_seeds(1))
    failures = run_all([folder], device="cpu", jobs=2, threads=1)
    assert {each.split(", ")[0] for each in failures} >= {"tiny: mpoe"}
    assert all("layers='nowhere'" in each for each in failures)
    assert {each["method"] for each in folder.results()} == {"dense"}


class StoppedError(Exception):
    """An error that stops a run."""


def stop_after(steps):
    """Return a function to call after every step of a run."""

    def on_step():
        nonlocal steps
        steps -= 1
        if steps == 0:
            raise StoppedError

    return on_step


@pytest.mark.parametrize("method", ["mpoe-mask-0.5", "mpoe-slow-0.1", "moe-top2"])
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not(method, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    stage, data = replace(folder.setting.stage, steps=6), folder.data("main")
    mixture = {"num_experts": 4, "router": {"jitter_noise": 0.1}}
    run = training.Run(stage, method, 4e-3, 1, mixture, data)
    whole = training.train(run, tmp_path / "whole", lambda: None)
    for steps in (2, 5):
        with pytest.raises(StoppedError):
            training.train(run, tmp_path / "stopped", stop_after(steps))
    resumed = training.train(run, tmp_path / "stopped", lambda: None)
    assert without_timings([resumed]) == without_timings([whole])


def test_tensorboard_shows_every_step_once_also_of_a_run_that_was_stopped(
    folder, tmp_path, monkeypatch
):
    stage = replace(folder.setting.stage, steps=6)
    curve, losses = tmp_path / "curve", {}
    run = training.Run(stage, "mpoe", 4e-3, 1, {"num_experts": 4}, folder.data("main"), curve=curve)
    make_step = training.make_step

    def recorded(model, optimizer, batch):
        learning_rate = optimizer.param_groups[0]["lr"]
        losses[learning_rate] = make_step(model, optimizer, batch)
        return losses[learning_rate]

    monkeypatch.setattr(training, "make_step", recorded)
    for steps in (3, 5):  # without a checkpoint: the second run makes the first one's steps again
        with contextlib.suppress(StoppedError):
            training.train(run, tmp_path / "stopped", stop_after(steps))
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    training.train(run, tmp_path / "stopped", lambda: None)
    shown = EventAccumulator(str(curve)).Reload().Scalars("loss")
    assert [event.step for event in shown] == list(range(6))
    assert len(losses) == 6  # the schedule gives every step a rate of its own
    assert [event.value for event in shown] == [loss.item() for loss in losses.values()]


def test_curves_lie_beside_the_runs_where_they_are_wanted(texts, tmp_path):
    one = setting(*texts, methods=("dense",)).with_seeds(1)
    for name, wanted in (("with", True), ("without", False)):
        folder = SettingFolder(tmp_path / name, one, wanted)
        assert run_all([folder], device="cpu", jobs=2, threads=1) == []
        found = {path.parent.relative_to(folder.path) for path in folder.path.rglob("*tfevents*")}
        names = ["dense/lr0.001-seed0", "dense/lr0.004-seed0", "pretraining/lr0.001-seed0"]
        assert found == ({Path("curves") / each for each in names} if wanted else set())


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_running_and_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "experiments", "--quick", "--settings", "decoder",
        "--output", str(tmp_path), "--seeds", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        runs = tmp_path / "decoder" / "runs"
        while not list(runs.glob("*/*.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    _wait_for_the_end_of(process.pid)
    made = {path: path.read_bytes() for path in runs.glob("*/*.json")}
    assert made
    assert all(json.loads(text) for text in made.values())


@pytest.mark.slow
def test_runs_of_minutes_do_not_outlive_a_killed_command(tmp_path):
    command = [
        sys.executable, "-m", "experiments", "--settings", "decoder", "--output", str(tmp_path),
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not (tmp_path / "decoder" / "pretrained").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2)  # until the first of 1500 steps are under way
        process.send_signal(signal.SIGKILL)
    _wait_for_the_end_of(process.pid)


def _wait_for_the_end_of(group):
    deadline = time.monotonic() + 30
    try:
        while _alive(group):
            assert time.monotonic() < deadline, "runs outlived the command"
            time.sleep(0.1)
    finally:
        if _alive(group):
            os.killpg(group, signal.SIGKILL)


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_step_costs_the_median_of_the_turns_after_the_first_two(
    folder, texts, tmp_path, monkeypatch
):
    other = replace(setting(*texts), methods=("dense", "mpoe"), cost_turns=3)
    copied = SettingFolder(tmp_path, other)
    shutil.copytree(folder.path, copied.path, ignore=shutil.ignore_patterns("costs"))
    (job,) = cost_jobs(copied, "cpu")
    # Of a dense step and MPOE's in turn: two that warm up, three that count.
    seconds = iter([90.0, 1.0, 80.0, 2.0, 1.0, 2.0, 5.0, 9.0, 2.0, 6.0])
    monkeypatch.setattr(costs, "_timed", lambda step, turn, device: next(seconds))
    turns: list[None] = []
    assert job.make(lambda: turns.append(None)) == {"method": "mpoe", "time_ratio": 3.0}
    assert len(turns) == job.steps == 5


def test_the_report_has_every_run_and_says_what_it_is_of(folder, tmp_path):
    written = write_report([folder], tmp_path, "cpu")
    assert all(path.stat().st_size for path in written)
    data = read(tmp_path / "tiny.json")
    assert data["results"] == folder.results()
    page = (tmp_path / "tiny.md").read_text()
    assert "old.txt (not known, " in page
    table = rows(folder.setting, data)
    assert [row["method"] for row in table] == list(folder.setting.methods)
    for row in table:
        assert f"`{row['method']}`" in page
        assert f"{row['result'][0]:.4f} ± {row['result'][1]:.4f}" in page
        assert row["seeds"] == 2
    assert "MPOE is better than the dense model" in (tmp_path / "claims.md").read_text()


def test_an_interrupted_setting_is_reported_as_far_as_it_is(folder, texts, tmp_path):
    more = setting(*texts, methods=("dense", "mpoe", "split-64"))
    half = folder.result("split-64", 1e-3, 0)  # one of two learning rates: not a fair row yet
    half.parent.mkdir()
    write(half, read(folder.result("mpoe", 1e-3, 0)) | {"method": "split-64"})
    write_report([SettingFolder(folder.root, more)], tmp_path, "cpu")
    page = (tmp_path / "tiny.md").read_text()
    assert "`mpoe`" in page
    assert "split-64" not in page


def test_a_setting_without_results_is_left_out(texts, tmp_path):
    folder = SettingFolder(tmp_path / "nothing", setting(*texts))
    assert write_report([folder], tmp_path / "report", "cpu") == []


def test_a_step_goes_no_further_than_the_gradient_that_is_clipped_to():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()

    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            return SimpleNamespace(loss=1000 * self.linear(x).sum())

    training.make_step(
        Steep(), torch.optim.SGD(model.parameters(), lr=0.5), {"x": torch.ones(3, 2)}
    )
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_schedule_warms_up_and_ends_above_zero():
    rates = [training._schedule(step, 50) for step in range(50)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 45 / 46])
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[5:] == sorted(rates[5:], reverse=True)
