"""A conversion that was interrupted goes on to the same bytes, whatever its tensors are called."""

import os

import pytest
import torch
from safetensors.torch import save_file

from tnmoe.hf.conversion import Conversion, Piece
from tnmoe.hf.shards import Checkpoint

SETTINGS = {"shard_bytes": 24, "jobs": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, and machines are not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def source_of(folder, names):
    folder.mkdir()
    save_file({name: torch.randn(3) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"words": 1}')
    return folder


def plan(folder):
    """Copies of all tensors, each a piece of its own."""
    source = Checkpoint(folder)
    pieces = [Piece(name, (name,), {name: spec}) for name, spec in source.specs.items()]
    return Conversion(source, tuple(pieces), {"model_type": "none"})


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("names", [["whole", "a"], ["laid out", "a"], ["two\nlines", "a\nwhole"]])
def test_tensors_may_be_called_what_the_journal_says(names, tmp_path):
    source = source_of(tmp_path / "source", names)
    plan(source).run(tmp_path / "undisturbed", **SETTINGS)
    for interrupted in range(3):
        calls = iter(range(interrupted))

        def stop(done, total, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        target = tmp_path / str(interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan(source).run(target, **SETTINGS, on_progress=stop)
        plan(source).run(target, **SETTINGS)
        assert files(target) == files(tmp_path / "undisturbed")
