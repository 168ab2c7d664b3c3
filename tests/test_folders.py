"""Files are written whole, and only where a file can be."""

import os
from pathlib import Path

import pytest

from tnmoe.errors import InputError
from tnmoe.folders import write_whole


def test_a_link_to_a_file_is_followed_and_stays(tmp_path):
    file, link = tmp_path / "disk" / "file", tmp_path / "link"
    file.parent.mkdir()
    for old in (None, b"old"):
        if old is not None:
            file.write_bytes(old)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        write_whole(link, b"new")
        assert link.is_symlink()
        assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file"]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no ordinary file"):
        write_whole(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
