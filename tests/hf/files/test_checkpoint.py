"""Folders of weights are read without trust, and written so that safetensors reads them."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tnmoe as tn
from tests.hf.files.tensors import tensors
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.tensors import TensorSpec


@pytest.fixture
def folder(tmp_path):
    """A sound folder of two files with an index."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    named = list(tensors().items())
    files = {"a.safetensors": dict(named[:4]), "b.safetensors": dict(named[4:])}
    for name, part in files.items():
        safetensors.torch.save_file(part, path / name, metadata={"format": "pt"})
    write_index(path, {key: name for name, part in files.items() for key in part})
    return path


def write_index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_is_read_as_the_library_reads_it(folder):
    source = Checkpoint(folder)
    expected = tensors()
    assert source.specs.keys() == expected.keys()
    assert source.config == {"model_type": "bert"}
    assert source.num_params == sum(each.numel() for each in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(source.load(name), tensor)
        assert source.load(name).dtype == tensor.dtype
        assert source.specs[name] == TensorSpec.of(tensor)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(source.chunks(name)) == raw


def test_links_are_followed_within_a_folder_and_in_the_cache_of_the_hub(folder, tmp_path):
    (folder / "a.safetensors").rename(folder / "real")
    (folder / "a.safetensors").symlink_to("real")
    assert len(Checkpoint(folder).specs) == len(tensors())
    hub = tmp_path / "models--someone--something"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir()
    for file in ("config.json", "real", "b.safetensors", "model.safetensors.index.json"):
        (folder / file).rename(hub / "blobs" / f"hash-of-{file}")
        name = "a.safetensors" if file == "real" else file
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{file}")
    assert len(Checkpoint(snapshot).specs) == len(tensors())


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def lie_about(path, **changes):
    """Rewrite a header's entry of t0."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["t0"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def instead(path, make):
    path.unlink()
    make(path)


def outside(folder):
    (folder / "a.safetensors").rename(folder.parent / "elsewhere")
    return folder.parent / "elsewhere"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "a.safetensors").unlink(), "a.safetensors is missing"),
        (lambda f: cut(f / "a.safetensors", 200), "a.safetensors is damaged"),
        (lambda f: cut(f / "a.safetensors", 3), "a.safetensors is damaged"),
        (lambda f: cut(f / "a.safetensors", 0), "a.safetensors is damaged"),
        (
            lambda f: (f / "a.safetensors").write_bytes(b"\xff" * 100),
            "a.safetensors is damaged or not a safetensors file",
        ),
        (lambda f: lie_about(f / "a.safetensors", shape=[3, 2]), "a.safetensors is damaged"),
        (lambda f: lie_about(f / "a.safetensors", data_offsets=[0, 99]), "is damaged"),
        (lambda f: (f / "config.json").unlink(), "not a Hugging Face folder: no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "should hold a JSON object, got list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("9" * 5000), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 10**6), "is nested too deeply"),
        (
            lambda f: os.truncate(f / "config.json", 2**41),
            "config.json has more than 100,000,000 bytes",
        ),
        (
            lambda f: instead(f / "config.json", os.mkfifo),
            "config.json is not a regular file",
        ),
        (lambda f: instead(f / "a.safetensors", os.mkfifo), "a.safetensors is not a regular file"),
        (lambda f: instead(f / "a.safetensors", Path.mkdir), "a.safetensors is a folder"),
        (
            lambda f: instead(f / "model.safetensors.index.json", os.mkfifo),
            "model.safetensors.index.json is not a regular file",
        ),
        (
            lambda f: os.truncate(f / "a.safetensors", 2**41),
            "a.safetensors is damaged .*: it has 2,199,023,255,552 bytes, its header describes",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "has no weight_map from tensors to files",
        ),
        (lambda f: write_index(f, {"t0": 3}), "has no weight_map"),
        (lambda f: write_index(f, {"other": "a.safetensors"}), "lists 1 tensors that its files"),
        (lambda f: write_index(f, {"t0": "c.safetensors"}), "c.safetensors is missing"),
        (
            lambda f: write_index(f, {"t0": "b.safetensors", "t4": "a.safetensors"}),
            "t0 is not in b.safetensors",
        ),
        (
            lambda f: write_index(f, {"t0": f"../{outside(f).name}"}),
            "elsewhere leads out of the folder: refused",
        ),
        (
            lambda f: write_index(f, {"t0": str(outside(f))}),
            "elsewhere leads out of the folder: refused",
        ),
        (
            lambda f: (f / "a.safetensors").symlink_to(outside(f)),
            "a.safetensors leads out of the folder: refused",
        ),
        (
            lambda f: (f / "a.safetensors").symlink_to("/dev/zero")
            if (f / "a.safetensors").unlink() is None
            else None,
            "leads out of the folder",
        ),
        (
            lambda f: [(f / "model.safetensors.index.json").unlink(), (f / "m.bin").touch()],
            "has no model.safetensors and no .*; m.bin is a pickle, which is never read",
        ),
        (
            lambda f: [os.link(f / "a.safetensors", f / "c.safetensors"),
                       write_index(f, {"t0": "a.safetensors", "t1": "c.safetensors"})],
            "both hold t0",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_the_reason(spoil, message, folder):
    spoil(folder)
    with pytest.raises(tn.InputError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_later_is_noticed(folder):
    source = Checkpoint(folder)
    cut(folder / "a.safetensors", source.locations["t0"].offset + 2)
    with pytest.raises(tn.InputError, match=r"a.safetensors ends within t0"):
        source.load("t0")
    with pytest.raises(tn.InputError, match=r"a.safetensors ends within t0"):
        list(source.chunks("t0"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(tn.InputError, match=r"there is no folder .*absent"):
        Checkpoint(tmp_path / "absent")
