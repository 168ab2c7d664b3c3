"""Safetensors reads the files that tnmoe writes a tensor at a time."""

import os

import pytest
import safetensors.torch
import torch

from tests.hf.files.tensors import tensors
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.shards import ShardWriter
from tnmoe.hf.files.tensors import TensorSpec


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_the_library_reads_files_that_were_written_in_any_order(limit, tmp_path):
    made = tensors()
    writer = ShardWriter(
        tmp_path, {name: TensorSpec.of(each) for name, each in made.items()}, limit
    )
    writer.create()
    for name in reversed(made):
        writer.write({name: made[name]})
    writer.write_index()
    read = {}
    for path in writer.files:
        part = safetensors.torch.load_file(path)
        sizes = [each.numel() * each.itemsize for each in part.values()]
        assert len(part) == 1 or sum(sizes) <= limit
        read |= part
    assert read.keys() == made.keys()
    assert all(torch.equal(read[name], made[name]) for name in made)
    (tmp_path / "config.json").write_text("{}")
    assert all(torch.equal(Checkpoint(tmp_path).load(name), made[name]) for name in made)
    assert (len(writer.files) == 1) == (limit == 10**9)
    with pytest.raises(ValueError, match="t0 should be"):
        writer.write({"t0": made["t1"]})


def test_numbers_are_aligned_to_their_size(tmp_path):
    made = {"byte": torch.zeros(3, dtype=torch.uint8), "double": torch.ones(5).double()}
    writer = ShardWriter(
        tmp_path, {name: TensorSpec.of(each) for name, each in made.items()}, 10**9
    )
    writer.create()
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint(tmp_path).locations["double"].offset % 8 == 0


def test_files_are_never_open_for_reading_while_others_may_write_to_them(tmp_path, monkeypatch):
    """Or a network file system's client writes back the page around what it wrote."""
    made, used, opened = tensors(), [], os.open

    def noted(path, flags, *arguments, **named):
        used.append(flags & os.O_ACCMODE)
        return opened(path, flags, *arguments, **named)

    writer = ShardWriter(tmp_path, {name: TensorSpec.of(each) for name, each in made.items()}, 60)
    writer.create()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noted)
        writer.write(made)
    assert set(used) == {os.O_WRONLY}
