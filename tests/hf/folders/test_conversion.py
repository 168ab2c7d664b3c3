"""Conversions make whole folders or none, the same bytes in every case, with little memory."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tnmoe as tn
from tnmoe import hf
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.shards import ShardWriter
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.pieces import Piece
from tnmoe.system import unfinished

CONFIG = hf.MPOEConfig(num_experts=2, sites=3, expert_noise=0.1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a Llama of eight layers, a tokenizer and files that nobody should copy."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "model.py").write_text("never run")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"mean": true}')
    return folder


def contents(folder):
    """Hashes of all files of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".tnmoe-lock")
    }


@pytest.fixture(scope="module")
def undisturbed(dense, tmp_path_factory):
    """Hashes of the files that an uninterrupted run makes."""
    target = tmp_path_factory.mktemp("whole") / "target"
    hf.prepare_upcycle(dense, CONFIG).run(target, shard_bytes=20_000, jobs=1)
    return contents(target)


def test_companion_files_are_copied_and_nothing_else(undisturbed):
    shards = [name for name in undisturbed if name.startswith("model-")]
    assert len(shards) > 3
    assert set(undisturbed) == {
        *shards, "model.safetensors.index.json", "config.json", "generation_config.json",
        "tokenizer.json", "LICENSE", "1_Pooling/config.json", ".tnmoe-files",
    }  # fmt: skip


@pytest.mark.parametrize("jobs", [2, 5])
def test_the_bytes_do_not_depend_on_the_number_of_jobs(jobs, dense, undisturbed, tmp_path):
    threads = torch.get_num_threads()
    hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", shard_bytes=20_000, jobs=jobs)
    assert contents(tmp_path / "target") == undisturbed
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as later:  # later threads use as many cores as before
        assert later.submit(torch.get_num_threads).result() == threads


KILLED = """
import os, signal, sys
from tnmoe import hf
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
config = hf.MPOEConfig(num_experts=2, sites=3, expert_noise=0.1)
hf.prepare_upcycle(sys.argv[1], config).run(
    sys.argv[2], shard_bytes=20_000, jobs=2, on_progress=progress
)
"""


def kill(dense, target, after):
    done = subprocess.run([sys.executable, "-c", KILLED, dense, target, str(after)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def leave_killed(dense, tmp_path_factory):
    """Return a function that leaves what a killed run does: its process, once, takes seconds."""
    left = {}

    def leave(target, after):
        if after not in left:
            first = tmp_path_factory.mktemp("killed") / "target"
            kill(dense, first, after)
            left[after] = first.with_name("target.partial")
        shutil.copytree(left[after], target.with_name("target.partial"))

    return leave


def test_a_killed_run_resumes_and_makes_the_same_bytes(dense, undisturbed, tmp_path):
    target, part = tmp_path / "target", tmp_path / "target.partial"
    source = contents(dense)
    kill(dense, target, after=4)
    assert part.is_dir()
    assert not target.exists()
    # Finished pieces are not made again, and an incomplete line does not count.
    journal = part / ".tnmoe-journal"
    with open(journal, "a") as file:
        file.write("model.layers.6.ml")
    begun = []
    hf.prepare_upcycle(dense, CONFIG).run(
        target, shard_bytes=20_000, on_progress=lambda done, total: begun.append((done, total))
    )
    assert 0 < begun[0][0] < begun[0][1] == begun[-1][0]
    assert len(begun) == 1 + 9 - 4
    assert contents(target) == undisturbed
    assert contents(dense) == source
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.slow
def test_a_run_that_was_killed_at_its_beginning_resumes(
    line, leave_killed, dense, undisturbed, tmp_path
):
    leave_killed(tmp_path / "target", after=1)
    journal = tmp_path / "target.partial" / ".tnmoe-journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: line + 1]))
    if line == 0:  # the files may not have been laid out
        for path in (tmp_path / "target.partial").rglob("*.safetensors"):
            path.write_bytes(b"")
    hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_was_killed_after_the_move_is_done(overwrite, dense, undisturbed, tmp_path):
    """The new folder was in its place, and the old one not yet removed."""
    target = tmp_path / "target"
    hf.prepare_upcycle(dense, hf.MPOEConfig(num_experts=2, sites=3)).run(target)

    class StoppedError(Exception):
        pass

    def stop(folder):
        (folder / "config.json").unlink()
        raise StoppedError

    conversion = hf.prepare_upcycle(dense, CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "remove_own_files", stop)
        with pytest.raises(StoppedError):
            conversion.run(target, overwrite=True, shard_bytes=20_000)
    files = conversion.run(target, overwrite=overwrite, shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed
    assert all(file.is_file() for file in files)
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(tn.InputError, match="is not empty"):
        conversion.run(target, shard_bytes=20_000)


def test_a_folder_that_cannot_be_moved_into_place_is_kept(dense, tmp_path):
    def refuse(part, target):
        raise PermissionError(13, "Permission denied", str(target))

    conversion = hf.prepare_upcycle(dense, CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(
            tn.InputError, match=r"target: Permission denied; the same call goes on"
        ):
            conversion.run(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target.partial"]
    calls = []
    conversion.run(tmp_path / "target", on_progress=lambda *done: calls.append(done))
    assert not calls
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.slow
def test_a_second_run_with_the_same_target_is_refused_and_names_the_first(
    overwrite, dense, undisturbed, tmp_path
):
    """At every moment of the first run, in the same thread, another thread and another process."""
    conversion, other = (
        hf.prepare_upcycle(dense, CONFIG),
        hf.prepare_upcycle(dense, hf.MPOEConfig(sites=3)),
    )
    target = tmp_path / "target"
    message = rf"target is in use by process {os.getpid()} on .* since \d{{4}}-"

    def again(done, total):
        for each in (conversion, other):
            with pytest.raises(tn.InputError, match=message):
                each.run(target, shard_bytes=20_000, overwrite=overwrite)
        with (
            ThreadPoolExecutor(1) as thread,
            pytest.raises(tn.InputError, match=message),
        ):
            thread.submit(conversion.run, target, overwrite=overwrite).result()
        if done == total and not overwrite:
            command = [sys.executable, "-c", KILLED, dense, target, "100"]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            assert f"in use by process {os.getpid()} on" in process.stderr

    conversion.run(target, shard_bytes=20_000, on_progress=again)
    assert contents(target) == undisturbed
    assert os.listdir(tmp_path) == ["target"]


def test_an_error_of_the_callback_leaves_the_unfinished_folder_alone(dense, undisturbed, tmp_path):
    def watch(done, total):
        if done > total / 2:
            raise tn.InputError("the callback's own")

    conversion = hf.prepare_upcycle(dense, CONFIG)
    with pytest.raises(tn.InputError, match="the callback's own"):
        conversion.run(tmp_path / "target", shard_bytes=20_000, on_progress=watch)
    begun = []
    conversion.run(
        tmp_path / "target", shard_bytes=20_000, on_progress=lambda *done: begun.append(done[0])
    )
    assert begun[0] > 0
    assert contents(tmp_path / "target") == undisturbed


def test_an_interrupted_run_leaves_no_threads_at_work(dense, tmp_path):
    def watch(done, total):
        if done:
            raise KeyboardInterrupt

    before = torch.get_num_threads(), threading.active_count()
    with pytest.raises(
        KeyboardInterrupt
    ) as held:  # keeps all frames, the generator's included, alive
        hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", jobs=2, on_progress=watch)
    assert (torch.get_num_threads(), threading.active_count()) == before
    assert held.tb is not None


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(dense, undisturbed, tmp_path):
    target = tmp_path / "target"
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('at work'); input()")
    command = [sys.executable, "-u", "-c", script, dense, target, "3"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    conversion = hf.prepare_upcycle(dense, CONFIG)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        with pytest.raises(tn.InputError, match=f"in use by process {process.pid} on"):
            conversion.run(target, shard_bytes=20_000)
        process.kill()
    conversion.run(target, shard_bytes=20_000)
    assert contents(target) == undisturbed


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_appear_at_the_target_during_a_run_are_kept(
    overwrite, dense, undisturbed, tmp_path
):
    target = tmp_path / "target"
    conversion = hf.prepare_upcycle(dense, CONFIG)
    if overwrite:
        conversion.run(target, shard_bytes=30_000)

    def appear(done, total):
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")

    message = "did not write there.*: thesis.txt" if overwrite else "is not empty"
    with pytest.raises(tn.InputError, match=message):
        conversion.run(target, shard_bytes=20_000, overwrite=overwrite, on_progress=appear)
    assert (target / "thesis.txt").read_text() == "years of work"
    if overwrite:
        hf.from_pretrained(target)
    (target / "thesis.txt").rename(tmp_path / "thesis.txt")
    # No piece is made again.
    conversion.run(target, shard_bytes=20_000, overwrite=overwrite, on_progress=appear)
    assert contents(target) == undisturbed


def test_a_source_that_changes_during_a_run_makes_no_target(dense, tmp_path):
    """Another conversion may replace it, for instance."""
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    conversion = hf.prepare_upcycle(source, CONFIG)

    def change(done, total):
        weights = source / "model.safetensors"
        shutil.copyfile(weights, tmp_path / "copy")
        (tmp_path / "copy").rename(weights)

    with pytest.raises(tn.InputError, match=r"model.safetensors has changed since it was first"):
        conversion.run(tmp_path / "target", on_progress=change)
    with pytest.raises(tn.InputError, match=r"model.safetensors has changed since it was first"):
        conversion.run(tmp_path / "target")
    gone = hf.prepare_upcycle(source, CONFIG)
    with pytest.raises(tn.InputError, match=r"config.json has changed since it was first read"):
        gone.run(tmp_path / "target", on_progress=lambda *_: shutil.rmtree(source, True))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names", [["whole", "a"], ["laid out", "a"], ["two\nlines", "a\nwhole"]])
def test_tensors_may_have_names_that_the_journal_uses(names, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: torch.randn(3) for name in names}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    checkpoint = Checkpoint(source)
    pieces = [Piece(name, (name,), {name: spec}) for name, spec in checkpoint.specs.items()]
    conversion = Conversion(checkpoint, tuple(pieces), {"model_type": "none"})
    conversion.run(tmp_path / "undisturbed")
    for interrupted in range(3):
        calls = iter(range(interrupted))

        def stop(done, total, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        target = tmp_path / str(interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversion.run(target, on_progress=stop, jobs=1)
        conversion.run(target)
        assert contents(target) == contents(tmp_path / "undisturbed")


def test_a_run_that_was_killed_before_it_had_a_journal_begins_again(dense, undisturbed, tmp_path):
    part = tmp_path / "target.partial"
    part.mkdir()
    (part / ".tnmoe-lock").touch()
    (part / "..tnmoe-journal.0123abc").write_text("half of a jour")
    hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.slow
def test_a_run_whose_new_folder_is_gone_begins_again(leave_killed, dense, undisturbed, tmp_path):
    leave_killed(tmp_path / "target", after=4)
    shutil.rmtree(tmp_path / "target.partial" / "new")
    hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed


def test_files_that_a_killed_run_left_are_not_in_the_result(
    leave_killed, dense, undisturbed, tmp_path
):
    leave_killed(tmp_path / "target", after=4)
    new = tmp_path / "target.partial" / "new"
    (new / ".config.json.0123abc").write_text("{")
    (new / "2_Normalize").mkdir()
    (new / "2_Normalize" / "config.json").write_text("{}")  # the source had it then
    (new / "empty").mkdir()
    hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed
    assert {path.name for path in (tmp_path / "target").iterdir() if path.is_dir()} == {"1_Pooling"}


def test_a_run_does_not_resume_an_unfinished_folder_of_another_conversion(
    leave_killed, dense, tmp_path
):
    """The message names the first setting that differs."""
    target = tmp_path / "target"
    leave_killed(target, after=4)
    other = hf.prepare_upcycle(dense, hf.MPOEConfig(num_experts=2, sites=3))
    before = contents(tmp_path)
    for conversion, size, what in (
        (other, 20_000, "config.tnmoe.config.expert_noise is 0.1 there and 0.0 here"),
        (hf.prepare_upcycle(dense, CONFIG), 30_000, "shard_bytes is 20000 there and 30000 here"),
        (hf.prepare_upcycle(dense, CONFIG, seed=1), 20_000, "settings.seed is 0 there and 1 here"),
    ):
        with pytest.raises(
            tn.InputError, match=rf"unfinished work of another conversion \({what}\): remove"
        ):
            conversion.run(target, shard_bytes=size)
    assert contents(tmp_path) == before
    other.run(target, overwrite=True)
    assert hf.from_pretrained(target).num_parameters() > 0
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


@pytest.mark.slow
def test_a_run_does_not_resume_with_a_changed_source(dense, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    kill(source, tmp_path / "target", after=2)
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(tn.InputError, match="unfinished work of another conversion"):
        hf.prepare_upcycle(source, CONFIG).run(tmp_path / "target", shard_bytes=20_000)


def test_anything_in_the_way_is_kept(dense, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    conversion = hf.prepare_upcycle(dense, CONFIG)
    with pytest.raises(tn.InputError, match="target is not empty: choose another folder"):
        conversion.run(target)
    (tmp_path / "target2.partial" / "new").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(tn.InputError, match=r"target2.partial is in the way"):
            conversion.run(tmp_path / "target2", overwrite=overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(tn.InputError, match="file is a file, not a folder"):
        conversion.run(tmp_path / "file", overwrite=True)
    for inside in (dense, dense / "new", dense.parent):
        with pytest.raises(tn.InputError, match="overlaps with the source"):
            conversion.run(inside, overwrite=True)
    (tmp_path / "b.partial").mkdir()
    shutil.copytree(dense, tmp_path / "b.partial", dirs_exist_ok=True)
    with pytest.raises(tn.InputError, match=r"b.partial overlaps with the source"):
        hf.prepare_upcycle(tmp_path / "b.partial", CONFIG).run(tmp_path / "b")
    assert (target / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "target2.partial" / "new").is_dir()


def test_only_what_a_conversion_wrote_is_replaced(dense, undisturbed, tmp_path):
    target = tmp_path / "target"
    conversion = hf.prepare_upcycle(dense, CONFIG)
    conversion.run(target)
    (target / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(tn.InputError, match=r"target holds what tnmoe did not.*: thesis.txt;"):
        conversion.run(target, shard_bytes=20_000, overwrite=True)
    assert contents(tmp_path) == before
    (target / "thesis.txt").unlink()
    # A model that was trained further and saved in the same place.
    hf.from_pretrained(target).save_pretrained(target)
    with pytest.raises(tn.InputError, match=r"what changed since: .*, model.safetensors"):
        conversion.run(target, shard_bytes=20_000, overwrite=True)
    shutil.rmtree(target)
    conversion.run(target)
    conversion.run(target, shard_bytes=20_000, overwrite=True)
    assert contents(target) == undisturbed
    # A checkpoint that tnmoe did not write.
    shutil.copytree(dense, tmp_path / "others")
    with pytest.raises(tn.InputError, match=r"others holds what tnmoe did not write there"):
        conversion.run(tmp_path / "others", overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_a_folder_is_followed_and_stays(exists, dense, undisturbed, tmp_path):
    disk, link = tmp_path / "disk" / "model", tmp_path / "target"
    conversion = hf.prepare_upcycle(dense, CONFIG)
    if exists:
        conversion.run(disk)
    link.symlink_to(disk)
    files = conversion.run(link, shard_bytes=20_000, overwrite=exists)
    assert link.is_symlink()
    assert contents(disk) == undisturbed
    assert {file.parent for file in files} == {link}
    assert os.listdir(disk.parent) == ["model"]


def test_a_companion_file_outside_the_source_is_refused_before_any_work(dense, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    kill(source, tmp_path / "target", after=2)
    (tmp_path / "secret.txt").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "secret.txt")
    before = contents(tmp_path)
    with pytest.raises(tn.InputError, match=r"merges.txt leads out of the folder: refused"):
        hf.prepare_upcycle(source, CONFIG).run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("settings", [{"jobs": 0}, {"shard_bytes": 0}])
def test_bad_settings_are_named_and_leave_the_unfinished_folder_alone(
    settings, leave_killed, dense, tmp_path
):
    leave_killed(tmp_path / "target", after=4)
    before = contents(tmp_path)
    with pytest.raises(tn.InputError, match="must be a positive integer, got 0"):
        hf.prepare_upcycle(dense, CONFIG).run(
            tmp_path / "target", **{"shard_bytes": 20_000} | settings
        )
    assert contents(tmp_path) == before


def test_a_result_larger_than_the_disk_is_not_begun(dense, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(tn.InputError, match=r"has room for 1e-06 GB, the result needs .* GB"):
        hf.prepare_upcycle(dense, CONFIG).run(tmp_path / "new" / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_the_run_resumes_later(
    dense, undisturbed, tmp_path, monkeypatch
):
    write, calls = ShardWriter.write, []

    def fails_later(self, tensors):
        calls.append(None)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, tensors)

    monkeypatch.setattr(ShardWriter, "write", fails_later)
    conversion = hf.prepare_upcycle(dense, CONFIG)
    with pytest.raises(tn.InputError, match="No space left on device; the same call goes on"):
        conversion.run(tmp_path / "target", shard_bytes=20_000)
    assert not (tmp_path / "target").exists()
    conversion.run(tmp_path / "target", shard_bytes=20_000)
    assert contents(tmp_path / "target") == undisturbed


def test_weights_with_infinity_leave_nothing_behind(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=40,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight[3, 3] = torch.inf
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(tn.InputError, match="contains NaN or infinity"):
        hf.prepare_upcycle(tmp_path / "dense", CONFIG).run(tmp_path / "target")
    assert [each.name for each in tmp_path.iterdir()] == ["dense"]


MEASURED = """
import resource, sys
from tnmoe import hf
small, large = sys.argv[1:3]
config = hf.MPOEConfig(num_experts=2, sites=3)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hf.prepare_upcycle(small, config).run(small + "-out", jobs=1)
before = peak()
hf.prepare_upcycle(large, config).run(large + "-out", jobs=1)
print((peak() - before) * 1024)
"""


@pytest.mark.slow
def test_a_large_checkpoint_needs_no_more_memory_than_a_small_one(tmp_path):
    sizes = {}
    for name, layers, vocabulary in (("small", 1, 100), ("large", 24, 100_000)):
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=256, num_hidden_layers=layers,
            num_attention_heads=2, intermediate_size=512, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        sizes[name] = sum(each.numel() * 4 for each in model.parameters())
    script = [sys.executable, "-c", MEASURED, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.15 * (sizes["large"] - sizes["small"])
