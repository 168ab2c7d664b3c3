"""A source that changes during a conversion makes no target, whatever changes and when."""

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

import tnmoe as tn
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.shards import ShardWriter
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.pieces import Piece, copy_pieces
from tnmoe.system.unfinished import UnfinishedFolder


@pytest.fixture
def source(tmp_path):
    """A folder of four tensors in two files, with a tokenizer's file."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, names in enumerate(("ab", "cd"), start=1):
        tensors = {name: torch.ones(3) for name in names}
        save_file(tensors, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors",'
        ' "c": "model-2.safetensors", "d": "model-2.safetensors"}}'
    )
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"words": 1}')
    return folder


def prepare(folder):
    source = Checkpoint(folder)
    piece = Piece("d", ("d",), {"d": source.specs["d"]}, lambda: {"d": -source.load("d")})
    return Conversion(source, (*copy_pieces(source, {name: name for name in "abc"}), piece), {})


def rewrite(path):
    """Change a file in place, and keep its size and time."""
    time.sleep(0.02)  # file systems count times in ticks
    status = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path):
    """Put another file of the same size and time in its place."""
    shutil.copy2(path, path.with_suffix(".other"))
    rewrite(path.with_suffix(".other"))
    path.with_suffix(".other").replace(path)


def touch(path):
    path.touch()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def grow(path):
    with open(path, "ab") as file:
        file.write(b" ")


def remove(path):
    path.unlink()


CHANGES = [rewrite, replace, touch, truncate, grow, remove]


def before_it_begins(monkeypatch, change):
    monkeypatch.setattr(UnfinishedFolder, "begin", first(change, UnfinishedFolder.begin))


def before_the_first_piece(monkeypatch, change):
    monkeypatch.setattr(ShardWriter, "create", first(change, ShardWriter.create))


def after_the_first_piece(monkeypatch, change):
    monkeypatch.setattr(ShardWriter, "write", then(change, ShardWriter.write))


def after_the_last_piece(monkeypatch, change):
    monkeypatch.setattr(ShardWriter, "write_index", first(change, ShardWriter.write_index))


def after_the_small_files(monkeypatch, change):
    monkeypatch.setattr(shutil, "copyfile", then(change, shutil.copyfile))


MOMENTS = [before_it_begins, before_the_first_piece, after_the_first_piece, after_the_last_piece,
           after_the_small_files]  # fmt: skip


def first(change, call):
    def changed(*arguments):
        change()
        return call(*arguments)

    return changed


def then(change, call):
    def changed(*arguments, **named):
        result = call(*arguments, **named)
        change()
        return result

    return changed


def once(change, path):
    """Change a file at the first call only."""
    left = [change]
    return lambda: left.pop()(path) if left else None


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["model-2.safetensors", "config.json", "model.safetensors.index.json"]
)
def test_a_file_that_changes_during_a_run_is_named(
    name, change, moment, source, tmp_path, monkeypatch
):
    whole = prepare(source)
    with monkeypatch.context() as patch:
        moment(patch, once(change, source / name))
        with pytest.raises(tn.InputError, match=rf"{name} (has changed since it was|ends within)"):
            whole.run(tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_companion_files_are_all_of_the_same_moment(change, moment, source, tmp_path, monkeypatch):
    whole = prepare(source)
    with monkeypatch.context() as patch:
        moment(patch, once(change, source / "tokenizer.json"))
        with pytest.raises(
            tn.InputError,
            match=r"tokenizer.json( has changed|: No such).*; the same call goes",
        ):
            whole.run(tmp_path / "target")
    calls = []
    whole.run(tmp_path / "target", on_progress=lambda *done: calls.append(done))
    assert len(calls) == 1  # no piece is made again
    made, now = tmp_path / "target" / "tokenizer.json", source / "tokenizer.json"
    assert made.exists() == now.exists()
    assert change is remove or made.read_bytes() == now.read_bytes()


@pytest.mark.parametrize("change", CHANGES[:-3])
def test_a_run_does_not_resume_after_a_change_of_the_source(change, source, tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source).run(tmp_path / "target", on_progress=stop)
    change(source / "model-2.safetensors")
    with pytest.raises(tn.InputError, match="unfinished work of another conversion"):
        prepare(source).run(tmp_path / "target")
