"""Power may fail at any moment: the same call then makes what an undisturbed one makes."""

import os
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

import tnmoe as tn
from tests.disk import Disk, all_left
from tnmoe.hf.conversion import Conversion, Piece, copies
from tnmoe.hf.shards import Checkpoint

# Two files of weights.
SETTINGS = {"shard_bytes": 24, "jobs": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Only of a simulated disk it matters what is synced."""
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

    pieces = (*copies(source, {"a": "a", "b": "b"}), piece("c"), piece("d"))
    return Conversion(source, pieces, {"model_type": "none"}, {"factor": factor})


@pytest.fixture(scope="module")
def old_and_new(source, tmp_path_factory):
    """What two conversions of other settings make: each by itself, undisturbed."""
    made = []
    for factor in (3, 2):
        target = tmp_path_factory.mktemp("undisturbed") / "target"
        doubled(source, factor).run(target, **SETTINGS)
        made.append(contents(target))
    return made


def test_a_conversion_goes_on_after_a_power_cut(source, old_and_new, tmp_path):
    """Or after it was killed, since nothing may have been lost; another one disturbs nothing."""
    root, plan, (old, new) = tmp_path / "root", doubled(source), old_and_new
    root.mkdir()
    disk = Disk(root)
    with disk.watched():
        plan.run(root / "deep" / "target", **SETTINGS)
        done = disk.states()
    for number, left in enumerate(all_left(disk, tmp_path / "left")):
        target, expected = left / "deep" / "target", new
        assert contents(target) in ({}, new)
        if number % 2:
            try:
                doubled(source, 3).run(target, **SETTINGS)
                expected = old
            except tn.InputError as error:
                refused = str(error)
                assert "of another conversion: remove" in refused or "is not empty" in refused
        with suppress(tn.InputError):  # if all was done already, which has to show
            plan.run(target, **SETTINGS)
        assert contents(target) == expected
        assert os.listdir(target.parent) == ["target"]
    assert all(dict(state).keys() >= {f"deep/target/{name}" for name in new} for state in done)
    assert not any("deep/target.partial/.tnmoe-journal" in dict(state) for state in done)
    assert len(disk.left) > 100


def test_a_conversion_that_replaces_another_survives_a_power_cut(source, old_and_new, tmp_path):
    root, plan, (old, new) = tmp_path / "root", doubled(source), old_and_new
    doubled(source, 3).run(root / "target", **SETTINGS)
    disk = Disk(root)
    with disk.watched():
        plan.run(root / "target", **SETTINGS, overwrite=True)
    for number, folder in enumerate(all_left(disk, tmp_path / "left")):
        kept = folder / "target" if (folder / "target").exists() else folder / "target.partial/old"
        assert contents(kept) in (old, new)
        again, expected = (plan, new) if number % 2 else (doubled(source, 3), old)
        again.run(folder / "target", **SETTINGS, overwrite=True)
        assert contents(folder / "target") == expected
        assert os.listdir(folder) == ["target"]


def test_work_that_another_conversion_began_is_gone_after_a_power_cut(
    source, old_and_new, tmp_path
):
    root, plan, (old, new) = tmp_path / "root", doubled(source), old_and_new
    root.mkdir()

    def interrupted(plan, share):
        def stop(done, total):
            if done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            plan.run(root / "target", **SETTINGS, overwrite=True, on_progress=stop)

    interrupted(doubled(source, 3), 0.6)
    disk = Disk(root)
    with disk.watched():
        interrupted(plan, 0)
    for number, left in enumerate(all_left(disk, tmp_path / "left")):
        again, expected = (plan, new) if number % 2 else (doubled(source, 3), old)
        again.run(left / "target", **SETTINGS, overwrite=True)
        assert contents(left / "target") == expected
        assert os.listdir(left) == ["target"]
