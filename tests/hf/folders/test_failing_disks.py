"""After a power cut or a full disk at any moment, the same call makes the same bytes."""

import builtins
import errno
import io
import os
from contextlib import suppress

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tnmoe as tn
from tests.disk import Disk, all_left
from tnmoe import hf
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.pieces import Piece, copy_pieces

# Two files of weights.
SETTINGS = {"shard_bytes": 24, "jobs": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip real syncs: the simulated disk notes what is synced."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def contents(folder):
    """Bytes of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of a few tensors, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    save_file({name: torch.randn(3) for name in "abcd"}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"mean": true}')
    return folder


def doubled(folder, factor=2):
    """A conversion that copies two tensors and multiplies two."""
    source = Checkpoint(folder)

    def piece(name):
        return Piece(
            name, (name,), {name: source.specs[name]}, lambda: {name: factor * source.load(name)}
        )

    pieces = (*copy_pieces(source, {"a": "a", "b": "b"}), piece("c"), piece("d"))
    return Conversion(source, pieces, {"model_type": "none"}, {"factor": factor})


@pytest.fixture(scope="module")
def old_and_new(source, tmp_path_factory):
    """Contents that two conversions with different settings make without interruption."""
    made = []
    for factor in (3, 2):
        target = tmp_path_factory.mktemp("undisturbed") / "target"
        doubled(source, factor).run(target, **SETTINGS)
        made.append(contents(target))
    return made


def test_a_conversion_resumes_after_a_power_cut(source, old_and_new, tmp_path):
    """A kill is a power cut that loses nothing. Another conversion disturbs nothing."""
    root, conversion, (old, new) = tmp_path / "root", doubled(source), old_and_new
    root.mkdir()
    disk = Disk(root)
    with disk.watched():
        conversion.run(root / "deep" / "target", **SETTINGS)
        done = disk.states()
    other = doubled(source, 3)
    for number, left in enumerate(all_left(disk, tmp_path / "left")):
        target, expected = left / "deep" / "target", new
        assert contents(target) in ({}, new)
        if number % 2:
            try:
                other.run(target, **SETTINGS)
                expected = old
            except tn.InputError as error:
                refused = str(error)
                differs = "(settings.factor is 2 there and 3 here): remove"
                assert differs in refused or "is not empty" in refused
        with suppress(tn.InputError):  # raised if all was done already, as the next line checks
            conversion.run(target, **SETTINGS)
        assert contents(target) == expected
        assert os.listdir(target.parent) == ["target"]
    assert all(dict(state).keys() >= {f"deep/target/{name}" for name in new} for state in done)
    assert not any("deep/target.partial/.tnmoe-journal" in dict(state) for state in done)
    assert len(disk.left) > 100


@pytest.mark.slow
def test_a_conversion_that_replaces_another_survives_a_power_cut(source, old_and_new, tmp_path):
    root, conversion, (old, new) = tmp_path / "root", doubled(source), old_and_new
    other = doubled(source, 3)
    other.run(root / "target", **SETTINGS)
    disk = Disk(root)
    with disk.watched():
        conversion.run(root / "target", **SETTINGS, overwrite=True)
    for number, folder in enumerate(all_left(disk, tmp_path / "left")):
        kept = folder / "target" if (folder / "target").exists() else folder / "target.partial/old"
        assert contents(kept) in (old, new)
        again, expected = (conversion, new) if number % 2 else (other, old)
        again.run(folder / "target", **SETTINGS, overwrite=True)
        assert contents(folder / "target") == expected
        assert os.listdir(folder) == ["target"]


def test_an_unfinished_folder_of_another_conversion_is_gone_after_a_power_cut(
    source, old_and_new, tmp_path
):
    root, conversion, (old, new) = tmp_path / "root", doubled(source), old_and_new
    root.mkdir()

    def interrupted(conversion, share):
        def stop(done, total):
            if done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            conversion.run(root / "target", **SETTINGS, overwrite=True, on_progress=stop)

    other = doubled(source, 3)
    interrupted(other, 0.6)
    disk = Disk(root)
    with disk.watched():
        interrupted(conversion, 0)
    for number, left in enumerate(all_left(disk, tmp_path / "left")):
        again, expected = (conversion, new) if number % 2 else (other, old)
        again.run(left / "target", **SETTINGS, overwrite=True)
        assert contents(left / "target") == expected
        assert os.listdir(left) == ["target"]


class Full:
    """A disk on which calls that need space fail, once a number of them have succeeded."""

    def __init__(self, patch, folder, after, code):
        self.left, self.code, self.folder = after, code, str(folder)
        for name in ("mkdir", "rename", "truncate", "fsync", "sendfile"):
            patch.setattr(os, name, self.limited(getattr(os, name)))
        opened = self.opened(open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)

    def use(self):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))

    def limited(self, call):
        def limited(place, *arguments, **named):
            if isinstance(place, int) or str(place).startswith(self.folder):
                self.use()
            return call(place, *arguments, **named)

        return limited

    def opened(self, call):
        def opened(file, mode="r", *arguments, **named):
            written = str(file).startswith(self.folder) and set(mode) & set("wax+")
            if written:
                self.use()
            stream = call(file, mode, *arguments, **named)
            if not written:
                return stream
            write = stream.write

            def limited(data):
                self.use()
                return write(data)

            return Delegate(stream, limited)

        return opened


class Delegate:
    """A file with another ``write`` method."""

    def __init__(self, stream, write):
        self.stream, self.write = stream, write

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.stream.close()


@pytest.mark.parametrize("error", [OSError("the link is down"), TimeoutError()], ids=repr)
def test_errors_without_a_number_of_the_system_keep_their_own_words(
    error, source, tmp_path, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr("tnmoe.hf.files.shards.ShardWriter.write", fail)
    told = f"target.partial: {str(error) or type(error).__name__}; the same call goes on from there"
    with pytest.raises(tn.InputError, match=f"{told}$"):
        doubled(source).run(tmp_path / "target", **SETTINGS)


@pytest.mark.parametrize(("replaces", "code"), [(True, errno.ENOSPC), (False, errno.EDQUOT)])
def test_a_conversion_on_a_disk_that_fills_up(
    replaces,
    code,
    source,
    old_and_new,
    tmp_path,
    monkeypatch,
):
    conversion, (old, new) = doubled(source), old_and_new
    for after in range(1000):
        target = tmp_path / str(after) / "target"
        if replaces:
            doubled(source, 3).run(target, **SETTINGS)
        with monkeypatch.context() as patch:
            Full(patch, tmp_path, after, code)
            try:
                conversion.run(target, **SETTINGS, overwrite=True)
                break
            except (tn.InputError, OSError) as error:
                told = str(error)
        assert os.strerror(code) in told
        assert "\n" not in told
        assert str(tmp_path) in told
        kept = target.with_name("target.partial") / "old" if "nor put back" in told else target
        assert contents(kept) in (new, old if replaces else {})
        conversion.run(target, **SETTINGS, overwrite=True)
        assert contents(target) == new
        assert os.listdir(target.parent) == ["target"]
    assert after > 30


def test_a_configuration_is_the_old_or_the_new_one_after_a_power_cut(tmp_path):
    sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = hf.upcycle(transformers.GPT2Model(config), hf.MPOEConfig(num_experts=2, sites=2))
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "config.json"
    path.write_text("old")
    disk = Disk(path.parent)
    with disk.watched():
        model.config.to_json_file(path)
    found = {(left / "config.json").read_text() for left in all_left(disk, tmp_path / "left")}
    assert found == {"old", path.read_text()}
